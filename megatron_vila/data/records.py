"""A training sample: its turns with markers where media stand, and these media. ``formats/`` reads records of many shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_vila.data.fields import Media
from megatron_vila.data.placement import Turn


class Record(NamedTuple):
    """One sample with its media placed: ``media[k]`` belongs to the k-th marker of its human turns, or of its document.

    ``turns`` are a conversation, or one turn of the role ``document`` alone: a text that is trained as a whole.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]


@dataclass(frozen=True)
class RecordRules:
    """How records are read: relative media paths start at ``media_dir``, ``media_format`` is the rule by which media are placed,
    and fields named in ``ignore_fields`` are not looked at, in a record and in its turns."""

    media_dir: str
    media_format: str = "vila"
    ignore_fields: frozenset[str] = frozenset()

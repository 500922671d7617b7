"""Opens the records of a run: what stands under a path says which kind of source reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.sources.energon import META
from megatron_vila.data.sources.joined import Joined
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.shards import Shards
from megatron_vila.data.sources.source import Source

PARTS = {"train": "train", "eval": "val"}
"""The part of a set of shards that is read where ``data.train`` or ``data.eval`` names the set."""


class Share(NamedTuple):
    """A source of a blend and its ``weight``: of the samples of a run, ``weight`` in the sum of all weights come from it."""

    source: Source
    weight: float


@dataclass(frozen=True)
class Format:
    """One way to keep records: ``name`` for messages, ``is_at`` tells whether a path holds them, ``open`` makes one source of
    several such paths by the settings of a run; the last argument is the part of a set of shards. Raises ``RecordError``."""

    name: str
    is_at: Callable[[str], bool]
    open: Callable[[DataConfig, Sequence[str], str], Source]


def _open_energon(data: DataConfig, paths: Sequence[str], part: str) -> Source:
    return _joined([Shards.of_energon(data, path, part) for path in paths])


FORMATS = (
    Format("a folder of Energon's", lambda path: os.path.isdir(os.path.join(path, META)), _open_energon),
    Format("a JSON or JSONL file", lambda path: True, lambda data, paths, part: JsonFiles.of(data, paths)),
)
"""The first format that is at a path reads it. JSON is last: it takes every other path, and says what is wrong with it."""


def open_blend(data: DataConfig, paths: Sequence[str], part: str = PARTS["train"]) -> list[Share]:
    """The sources of ``paths`` and their weights, by the settings of a run.

    Paths that stand side by side make one source, one path after the other. Raises ``RecordError`` for one that cannot be read.
    """
    return [Share(_open_listed(data, paths, part), 1.0)]


def open_records(data: DataConfig, paths: Sequence[str], part: str = PARTS["train"]) -> Source:
    """All records of ``paths``, one source after the other, each once whatever its weight. Raises ``RecordError``."""
    return _joined([share.source for share in open_blend(data, paths, part)])


def _open_listed(data: DataConfig, paths: Sequence[str], part: str) -> Source:
    if not paths:
        return FORMATS[-1].open(data, paths, part)  # which says what is expected
    formats = {path: next(each for each in FORMATS if each.is_at(path)) for path in paths}
    groups = groupby(paths, formats.__getitem__)
    return _joined([each.open(data, list(group), part) for each, group in groups])


def _joined(sources: Sequence[Source]) -> Source:
    return sources[0] if len(sources) == 1 else Joined(sources)

"""The samples that stand under a path, whatever keeps them, by number: so a set can be worked through in parts.

``formats/detect.py`` says which format it is; each has a reader here. Training reads JSON files and shards itself (``sources/``);
this is how the others are converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from megatron_vila.data.containers.json_file import JsonSamples
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import FORMATS, detect
from megatron_vila.data.records import Record, RecordRules


class Samples(Protocol):
    """Samples by number from 0, in the same order whenever they are opened."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Record | RecordError]]:
        """Samples ``start`` to ``stop``: the place of each, for messages, and its record or what is wrong with it."""


_READERS = {"json": JsonSamples, "jsonl": JsonSamples}


def open_samples(path: str, rules: RecordRules, format_name: str = "") -> Samples:
    """The samples under ``path``, of the format ``format_name`` if it is given, else of the one that is found there.

    Relative paths in records start at ``rules.media_dir``, or where the samples are if that is empty. Raises ``RecordError`` for
    what cannot be read at all.
    """
    name = format_name or detect(path)
    if name not in FORMATS:
        raise RecordError(f"{path}: the format {name} is unknown; use one of {', '.join(FORMATS)}")
    return _READERS[name](path, rules)


def part_of(count: int, part: int, parts: int) -> range:
    """The numbers of the samples in ``part`` (from 0) of ``parts`` parts, which cover ``count`` samples evenly."""
    if not 0 <= part < parts:
        raise ValueError(f"there is no part {part} of {parts} parts; they count from 0")
    return range(count * part // parts, count * (part + 1) // parts)

"""Opens the records of a run: what stands under a path says which kind of source reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.source import Source


@dataclass(frozen=True)
class Format:
    """One way to keep records: ``name`` for messages, ``is_at`` tells whether a path holds them, ``open`` makes one source of
    several such paths by the settings of a run. Raises ``RecordError``."""

    name: str
    is_at: Callable[[str], bool]
    open: Callable[[DataConfig, Sequence[str]], Source]


FORMATS = (Format("a JSON or JSONL file", lambda path: True, JsonFiles.of),)
"""The first format that is at a path reads it. JSON is last: it takes every other path, and says what is wrong with it."""


def open_records(data: DataConfig, paths: Sequence[str]) -> Source:
    """The records of ``paths``, one path after the other, by the settings of a run.

    Raises ``RecordError`` for a path that cannot be read and for paths of several formats.
    """
    formats = [next(each for each in FORMATS if each.is_at(path)) for path in paths] or [FORMATS[-1]]
    for path, found in zip(paths, formats, strict=False):
        if found is not formats[0]:
            raise RecordError(f"{paths[0]} is {formats[0].name} and {path} is {found.name}; name paths of one kind")
    return formats[0].open(data, paths)

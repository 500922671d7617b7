"""Samples in a JSON file (one list) or a JSONL file (one record a line), which training reads in place as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.read import read_record
from megatron_vila.data.records import Record, RecordRules
from megatron_vila.data.sources.places import name_of_record, record_places


class JsonSamples:
    """The records of one file. Raises ``RecordError`` for a file that is missing, empty or no list of records."""

    def __init__(self, path: str, rules: RecordRules) -> None:
        self._path, self._places = path, record_places(path)
        self._rules = replace(rules, media_dir=rules.media_dir or os.path.dirname(os.path.abspath(path)))

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Record | RecordError]]:
        with open(self._path, "rb", buffering=0) as stream:
            for offset, size, number in self._places[start:stop].tolist():
                name = name_of_record(self._path, number)
                default_id = f"{os.path.basename(self._path)}#{number}"
                try:
                    yield name, read_record(os.pread(stream.fileno(), size, offset), name, default_id, self._rules)
                except RecordError as error:
                    yield name, error

"""Records from LLaVA-format JSON and JSONL files.

Only the index of a file (``index.py``) is looked at when it is opened; the text of a record is read when it is asked for.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Sequence

import numpy as np

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.read import read_record
from megatron_vila.data.records import Record, RecordRules
from megatron_vila.data.sources.holdings import Holdings
from megatron_vila.data.sources.index import digest_of, index_of
from megatron_vila.data.sources.places import name_of_record
from megatron_vila.data.sources.source import BadRecordsError, ChangedFileError, lost, report_bad_records


class JsonFiles:
    """The records of several files, one file after the other: a ``Source``.

    ``skip_bad`` lets the object be made though some records are bad. Relative media paths start at ``media_dir``, at the folder
    of each file if that is empty. Reading a record opens its file anew.

    Raises ``RecordError`` for a file that is missing, empty or no list of records, ``BadRecordsError`` for bad records where
    they are not skipped or where no record is good.
    """

    is_self_contained = False

    def __init__(
        self,
        paths: Sequence[str],
        media_dir: str = "",
        media_format: str = "vila",
        skip_bad: bool = False,
        ignore_fields: Collection[str] = (),
    ) -> None:
        if not paths:
            raise RecordError(
                "no file with samples was given; set data.train to at least one LLaVA-format JSON or JSONL file"
            )
        self.paths = tuple(os.fspath(p) for p in paths)
        self._rules = [
            RecordRules(media_dir or os.path.dirname(os.path.abspath(p)), media_format, frozenset(ignore_fields))
            for p in self.paths
        ]
        indexes = [index_of(path, rules) for path, rules in zip(self.paths, self._rules, strict=True)]
        self._places = [index.places for index in indexes]
        self._starts = np.cumsum([0, *map(len, self._places)])
        self.bad = {
            int(start) + number: reason
            for start, index in zip(self._starts, indexes, strict=False)
            for number, reason in index.bad.items()
        }
        self.digest = digest_of([index.digest for index in indexes])
        self.holdings: dict[str, Holdings] = {}
        if self.bad and (len(self.bad) == len(self) or not skip_bad):
            raise BadRecordsError(report_bad_records(self.bad, len(self)), self.bad)

    @classmethod
    def of(cls, data: DataConfig, paths: Sequence[str]) -> JsonFiles:
        """The records of ``paths`` by the settings of a run."""
        return cls(paths, data.media_dir, data.media_format, data.bad_records == "skip", data.ignore_fields)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> Record:
        file, (offset, size, number, checksum) = self._place(index)
        path = self.paths[file]
        try:
            with open(path, "rb", buffering=0) as stream:
                text = os.pread(stream.fileno(), size, offset)
        except OSError as error:
            raise lost(path, error) from error
        if zlib.crc32(text) != checksum:
            raise ChangedFileError(
                f"{name_of_record(path, number)}: not what it was when the file was opened, so the file was changed; files of "
                "samples must stay as they are while a run reads them. Put the old file back, or start again with the new one"
            )
        where, default_id = name_of_record(path, number), f"{os.path.basename(path)}#{number}"
        return read_record(text, where, default_id, self._rules[file])

    def name(self, index: int) -> str:
        file, (_, _, number, _) = self._place(index)
        return name_of_record(self.paths[file], number)

    def _place(self, index: int) -> tuple[int, list[int]]:
        """The file of a record, and its row in the index."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, self._places[file][index - self._starts[file]].tolist()

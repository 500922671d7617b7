"""Samples of WebDataset shards by number, read in place: a ``Source``.

When a set is opened, only the table of its samples is looked at (``sample_table.py``); a sample is read, and checked, when it is
asked for. Its media are members of the shard, and nothing is unpacked.
"""

from __future__ import annotations

import os

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.records import Record, RecordRules
from megatron_vila.data.sources.energon import TRAIN, SplitPart, energon_table
from megatron_vila.data.sources.folder import Folder, LocalFolder
from megatron_vila.data.sources.holdings import FILE, Holdings, holdings_of
from megatron_vila.data.sources.remote import RemoteFolder, is_address
from megatron_vila.data.sources.sample_table import SampleTable
from megatron_vila.data.sources.samples import read_sample
from megatron_vila.data.sources.source import BadRecordsError, ChangedFileError, report_bad_records
from megatron_vila.data.sources.tar import Read, TarError
from megatron_vila.data.sources.wids import tar_table, wids_table

HEAD = 2**13
"""Bytes of a sample that are read at once: most often its record and the headers around it."""


class Shards:
    """The samples of ``table``, whose shards lie in ``folder``.

    ``rules`` is how records are read, ``skip_bad`` whether the object is made though some samples are bad; ``holdings`` is what a
    prepared set says of itself.

    Raises ``RecordError`` for a set without samples, ``BadRecordsError`` for bad ones where they are not skipped or where no
    sample is good.
    """

    is_self_contained = True

    def __init__(
        self,
        folder: Folder,
        table: SampleTable,
        rules: RecordRules,
        skip_bad: bool = False,
        holdings: Holdings | None = None,
    ) -> None:
        self.folder, self._table, self._rules = folder, table, rules
        self.bad, self.digest = table.bad, table.digest
        self.holdings = {folder.path: holdings} if holdings else {}
        if not len(table):
            raise RecordError(f"{folder.path}: its shards hold no sample")
        if self.bad and (len(self.bad) == len(self) or not skip_bad):
            raise BadRecordsError(report_bad_records(self.bad, len(self)), self.bad)

    @classmethod
    def of_energon(cls, data: DataConfig, path: str, part: SplitPart = TRAIN) -> Shards:
        """The samples of ``part`` of a folder that ``energon prepare`` has made, by the settings of a run."""
        folder: Folder = RemoteFolder(path, data) if is_address(path) else LocalFolder(path)
        return cls._of(data, folder, energon_table(folder, part))

    @classmethod
    def of_wids(cls, data: DataConfig, path: str) -> Shards:
        """The samples of a folder of VILA's WebDataset, by the settings of a run."""
        return cls._of(data, LocalFolder(path), wids_table(path))

    @classmethod
    def of_tars(cls, data: DataConfig, path: str) -> Shards:
        """The samples of a tar file, or of all in a folder without an index, by the settings of a run."""
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        return cls._of(data, LocalFolder(folder), tar_table(path))

    @classmethod
    def _of(cls, data: DataConfig, folder: Folder, table: SampleTable) -> Shards:
        rules = RecordRules("", data.media_format, frozenset(data.ignore_fields))
        told = folder.content(FILE)
        holdings = None if told is None else holdings_of(told, folder.place(FILE))
        return cls(folder, table, rules, data.bad_records == "skip", holdings)

    def __len__(self) -> int:
        return len(self._table)

    def record(self, index: int) -> Record:
        shard, start, size = self._place(index)
        name, key = self._table.shards[shard], self._table.key(index)
        path = self.folder.place(name)
        if index in self.bad:
            raise RecordError(self.bad[index])
        try:
            with self.folder.opened(name, int(self._table.sizes[shard]), start, start + size) as (read, storage):
                read = _with_head(read, start, size)
                return read_sample(path, read, start, size, key=key, rules=self._rules, storage=storage)
        except ChangedFileError as error:
            raise type(error)(f"at sample {key}: {error}") from error
        except TarError as error:
            raise RecordError(
                f"{path}, sample {key}: {error}; the shard is damaged, or it is not the one that was indexed: make the index anew"
            ) from error

    def name(self, index: int) -> str:
        return f"{self.folder.place(self._table.shards[self._place(index)[0]])}, sample {self._table.key(index)}"

    def _place(self, index: int) -> tuple[int, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard, start, size = self._table.places[index].tolist()
        return shard, start, size


def _with_head(read: Read, start: int, size: int) -> Read:
    """``read`` that takes the first bytes of a sample at once."""
    head = read(start, min(size, HEAD))

    def read_(offset: int, count: int) -> bytes:
        if start <= offset and offset + count <= start + len(head):
            return head[offset - start : offset - start + count]
        return read(offset, count)

    return read_

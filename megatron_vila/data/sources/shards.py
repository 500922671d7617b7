"""Samples of WebDataset shards by number, read in place: a ``Source``.

When a set is opened, only the table of its samples is looked at (``sample_table.py``); a sample is read, and checked, when it is
asked for. Its media are members of the shard, and nothing is unpacked.
"""

from __future__ import annotations

import os

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.records import Record, RecordRules
from megatron_vila.data.sources.energon import energon_table
from megatron_vila.data.sources.holdings import Holdings, read_holdings
from megatron_vila.data.sources.sample_table import SampleTable
from megatron_vila.data.sources.samples import read_sample
from megatron_vila.data.sources.source import BadRecordsError, ChangedFileError, report_bad_records
from megatron_vila.data.sources.tar import TarError
from megatron_vila.data.sources.wids import wids_table

HEAD = 2**13
"""Bytes of a sample that are read at once: most often its record and the headers around it."""


class Shards:
    """The samples of ``table``, whose shards lie in ``folder``. Reading a sample opens its shard anew.

    ``rules`` is how records are read, ``skip_bad`` whether the object is made though some samples are bad; ``holdings`` is what a
    prepared set says of itself.

    Raises ``RecordError`` for a set without samples, ``BadRecordsError`` for bad ones where they are not skipped or where no
    sample is good.
    """

    def __init__(
        self,
        folder: str,
        table: SampleTable,
        rules: RecordRules,
        skip_bad: bool = False,
        holdings: Holdings | None = None,
    ) -> None:
        self.folder, self._table, self._rules = folder, table, rules
        self._paths = [os.path.join(folder, name) for name in table.shards]
        self.bad, self.digest = table.bad, table.digest
        self.holdings = {folder: holdings} if holdings else {}
        if not len(table):
            raise RecordError(f"{folder}: its shards hold no sample")
        if self.bad and (len(self.bad) == len(self) or not skip_bad):
            raise BadRecordsError(report_bad_records(self.bad, len(self)), self.bad)

    @classmethod
    def of_energon(cls, data: DataConfig, folder: str, part: str = "train") -> Shards:
        """The samples of ``part`` of a folder that ``energon prepare`` has made, by the settings of a run."""
        return cls._of(data, folder, energon_table(folder, part))

    @classmethod
    def of_wids(cls, data: DataConfig, folder: str) -> Shards:
        """The samples of a folder of VILA's WebDataset, by the settings of a run."""
        return cls._of(data, folder, wids_table(folder))

    @classmethod
    def _of(cls, data: DataConfig, folder: str, table: SampleTable) -> Shards:
        rules = RecordRules("", data.media_format, frozenset(data.ignore_fields))
        return cls(folder, table, rules, data.bad_records == "skip", read_holdings(folder))

    def __len__(self) -> int:
        return len(self._table)

    def record(self, index: int) -> Record:
        shard, start, size = self._place(index)
        path, key = self._paths[shard], self._table.key(index)
        if index in self.bad:
            raise RecordError(self.bad[index])
        try:
            with open(path, "rb", buffering=0) as stream:
                length = os.fstat(stream.fileno()).st_size
                if length != self._table.sizes[shard]:
                    raise ChangedFileError(
                        f"{path}, sample {key}: the shard has {length:,} bytes and had {self._table.sizes[shard]:,} when it was "
                        "opened; shards must stay as they are while a run reads them. Put the old one back and start again"
                    )
                head = os.pread(stream.fileno(), min(size, HEAD), start)

                def read(offset: int, count: int) -> bytes:
                    if start <= offset and offset + count <= start + len(head):
                        return head[offset - start : offset - start + count]
                    return os.pread(stream.fileno(), count, offset)

                return read_sample(path, read, start, size, key, self._rules)
        except FileNotFoundError as error:
            raise ChangedFileError(
                f"{path}, sample {key}: the shard is gone since it was opened; put it back and start again"
            ) from error
        except TarError as error:
            raise RecordError(
                f"{path}, sample {key}: {error}; the shard is damaged, or it is not the one that was indexed: make the index anew"
            ) from error

    def cost(self, index: int) -> int | None:
        return None

    def name(self, index: int) -> str:
        return f"{self._paths[self._place(index)[0]]}, sample {self._table.key(index)}"

    def _place(self, index: int) -> tuple[int, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard, start, size = self._table.places[index].tolist()
        return shard, start, size

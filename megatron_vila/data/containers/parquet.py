"""Samples in parquet files, a row each, with the columns as fields of the record (the datasets library writes such files).

A row group is read at once and kept until a row of another one is asked for: rows are read in their order.
"""

from __future__ import annotations

import os
import threading
from types import ModuleType
from typing import Any

import numpy as np

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.base import Container, rules_of
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import files_under
from megatron_vila.data.formats.read import record_of
from megatron_vila.data.records import Record


class ParquetFiles(Container):
    """The rows of the file ``path``, or of all parquet files in the folder ``path``: a ``Source``.

    Raises ``RecordError`` for a file that is none, for a set without rows, and where pyarrow is not installed.
    """

    def __init__(self, data: DataConfig, path: str) -> None:
        self._parquet = _library(path)
        folder = os.path.isdir(path)
        names = [name for name in files_under(path) if name.endswith(".parquet")] if folder else [""]
        self._paths = [os.path.join(path, name) if name else path for name in names]
        super().__init__(self._paths)
        self._rules = rules_of(data, path if folder else os.path.dirname(os.path.abspath(path)))
        groups = [
            (file, group, rows) for file, name in enumerate(self._paths) for group, rows in enumerate(self._groups(name))
        ]
        self._places = [(file, group) for file, group, _ in groups]
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        files = np.array([file for file, _ in self._places], dtype=np.int64)
        self._first = self._starts[np.searchsorted(files, np.arange(len(self._paths)))]
        if not len(self):
            raise RecordError(f"{path}: the table has no rows")
        self._lock = threading.Lock()
        self._kept: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> Record:
        return record_of(self._row(index), self.name(index), self._default_id(index), self._rules)

    def name(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self._paths[file]}, row {row}"

    def _default_id(self, index: int) -> str:
        file, row = self._place(index)
        return f"{os.path.basename(self._paths[file])}#{row}"

    def _group_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _place(self, index: int) -> tuple[int, int]:
        """The file of a row, and its number there from 1."""
        file, _ = self._places[self._group_of(index)]
        return file, index - int(self._first[file]) + 1

    def _row(self, index: int) -> Any:
        number = self._group_of(index)
        with self._lock:
            if self._kept[0] != number:
                file, group = self._places[number]
                try:
                    with self._parquet.ParquetFile(self._paths[file]) as opened:
                        self._kept = (number, opened.read_row_group(group))
                except Exception as error:  # whatever the library raises about a damaged file
                    raise RecordError(f"{self.name(index)}: cannot be read: {error}") from error
            table = self._kept[1]
        try:
            return table.slice(index - int(self._starts[number]), 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise RecordError(f"{self.name(index)}: not UTF-8 text: {error}") from error

    def _groups(self, path: str) -> list[int]:
        """The number of rows of each row group of a file."""
        try:
            with self._parquet.ParquetFile(path) as opened:
                return [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        except Exception as error:
            raise RecordError(f"{path}: not a parquet file that can be read: {error}") from error


def _library(path: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RecordError(f"{path}: reading parquet needs pyarrow: pip install 'megatron-vila[prepare]'") from error
    return pyarrow.parquet

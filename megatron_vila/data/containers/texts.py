"""Samples in text files: each file a document, or each line."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.base import Container, rules_of, text_of
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import files_under
from megatron_vila.data.formats.read import record_of
from megatron_vila.data.records import Record

LARGEST_TEXT = 2**26
"""Bytes of the largest document."""


class _Texts(Container):
    """Stretches of files: ``places`` are the file, first byte and bytes of each; ``names`` what each is called."""

    def __init__(self, data: DataConfig, path: str, files: list[str], places: list[tuple[int, int, int]], names: Sequence[str]):
        super().__init__(files)
        self._rules = rules_of(data, os.path.dirname(os.path.abspath(path)))
        self._files, self._places, self._names = files, places, names
        if not places:
            raise RecordError(f"{path}: holds no text")

    def __len__(self) -> int:
        return len(self._places)

    def record(self, index: int) -> Record:
        (file, start, size), name = self._places[index], self.name(index)
        if size > LARGEST_TEXT:
            raise RecordError(f"{name}: {size:,} bytes; a document has at most {LARGEST_TEXT:,}. Cut it, or give one a line")
        with open(self._files[file], "rb") as stream:
            stream.seek(start)
            text = text_of(stream.read(size), name)
        return record_of({"text": text}, name, os.path.basename(name), self._rules)

    def name(self, index: int) -> str:
        return self._names[index]


class TextFiles(_Texts):
    """The text file ``path``, or all in the folder ``path``, each one document: a ``Source``. Raises ``RecordError``."""

    def __init__(self, data: DataConfig, path: str) -> None:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in files_under(path) if name.lower().endswith(".txt")]
        places = [(number, 0, os.path.getsize(file)) for number, file in enumerate(files)]
        super().__init__(data, path, files, places, files)


class TextLines(_Texts):
    """The lines of the text file ``path`` that are not blank, each one document: a ``Source``. Raises ``RecordError``."""

    def __init__(self, data: DataConfig, path: str) -> None:
        places, names, offset = [], [], 0
        try:
            with open(path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        places.append((0, offset, len(line.rstrip(b"\r\n"))))
                        names.append(f"{path}, line {number}")
                    offset += len(line)
        except OSError as error:
            raise RecordError(f"{path}: the text cannot be read: {error.strerror}") from error
        super().__init__(data, path, [path], places, names)

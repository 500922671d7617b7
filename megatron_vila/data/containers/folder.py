"""Samples in a folder of media: each with a caption of the same name beside it, or all with a table ``metadata``.

``a.mp4`` has its caption in ``a.txt``, or its record in ``a.json``; so has the folder ``a`` of pictures, which is then one video.
With both, ``a.json`` may be notes about the medium, as img2dataset leaves them.
A table (``metadata.csv`` or ``metadata.jsonl``) has a row for each sample: ``file_name`` and the fields of its record, such as
``text``.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.base import Container, rules_of, text_of
from megatron_vila.data.fields import MEDIA_ENDINGS, READABLE_PICTURES, RecordError, shown
from megatron_vila.data.formats.detect import METADATA, files_under
from megatron_vila.data.formats.read import names_media, parse_json, record_of, with_caption
from megatron_vila.data.records import Record

logger = logging.getLogger(__name__)

_CAPTIONS = (".txt", ".json")


def open_folder(data: DataConfig, path: str) -> Captioned | Tabled:
    """The samples of the folder ``path``. Raises ``RecordError`` for one without captions, and for a table that misses files."""
    tables = [name for name in METADATA if os.path.isfile(os.path.join(path, name))]
    if len(tables) > 1:
        raise RecordError(f"{path}: holds {tables[0]} and {tables[1]}; keep one of the two")
    return Tabled(data, path, tables[0]) if tables else Captioned(data, path)


class Captioned(Container):
    """The media in and below the folder ``path``, each with its caption: a ``Source``.

    Captions without a medium are told in a warning: they may be notes, or their media may be missing.
    """

    def __init__(self, data: DataConfig, path: str) -> None:
        files = list(files_under(path))
        super().__init__([os.path.join(path, name) for name in files])
        captions: dict[str, list[str]] = {}
        for name in files:
            stem, ending = os.path.splitext(name)
            if ending.lower() in _CAPTIONS:
                captions.setdefault(stem, []).append(name)
        media = _media(files, captions.keys())
        self._folder, self._media, self._captions = path, sorted(media), captions
        self._shared = {stem: [name for name in self._media if _stem(name) == stem] for stem in _repeated(map(_stem, media))}
        self._rules = replace(rules_of(data, path), media_dir=os.path.abspath(path))
        if not any(_stem(name) in captions for name in self._media):
            first = next(iter(self._media), "a.mp4")
            raise RecordError(
                f"{path}: no medium has a caption: put a text beside each ({_stem(first)}.txt for {first}), or a table "
                f"{METADATA[0]} with the columns file_name and text into the folder"
            )
        if lone := sorted(name for stem in captions.keys() - set(map(_stem, media)) for name in captions[stem]):
            logger.warning(
                "%s: %s has no medium of its name beside it and is not used%s",
                path, lone[0], "" if len(lone) == 1 else f"; {len(lone) - 1:,} more are like it",
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self._media)

    def name(self, index: int) -> str:
        return os.path.join(self._folder, self._media[index])

    def record(self, index: int) -> Record:
        medium, where = self._media[index], self.name(index)
        stem = _stem(medium)
        captions = self._captions.get(stem, [])
        if len(self._shared.get(stem, ())) > 1:
            raise RecordError(f"{where}: {' and '.join(self._shared[stem])} share one caption; give each its own name")
        if not captions:
            raise RecordError(f"{where}: no caption: write it into {stem}.txt, or its record into {stem}.json")
        told: Any = {}
        caption = None
        for name in captions:
            place = os.path.join(self._folder, name)
            if name.lower().endswith(".txt"):
                caption = text_of(_read(place), place)
            else:
                told = parse_json(_read(place), place)
        told = with_caption(told, caption) if isinstance(told, dict) else told
        return record_of(_with_medium(told, medium, where), where, stem, self._rules)


class Tabled(Container):
    """The rows of the table ``table`` in the folder ``path``: a ``Source``."""

    def __init__(self, data: DataConfig, path: str, table: str) -> None:
        self._table = os.path.join(path, table)
        super().__init__([self._table])
        self._rules = replace(rules_of(data, path), media_dir=os.path.abspath(path))
        with open(self._table, "rb") as stream:
            content = stream.read()
        self._rows: list[tuple[int, Any]] = (
            _csv(content, self._table)
            if table.endswith(".csv")
            else [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        )
        if not self._rows:
            raise RecordError(f"{self._table}: the table has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self._table}, line {self._rows[index][0]}"

    def record(self, index: int) -> Record:
        where, row = self.name(index), self._rows[index][1]
        told = parse_json(row, where) if isinstance(row, bytes) else row
        if isinstance(told, dict) and "file_name" in told:
            medium = told["file_name"]
            told = {name: value for name, value in told.items() if name != "file_name"}
            if not isinstance(medium, str) or not medium:
                raise RecordError(f"{where}, field 'file_name': must be the path of a medium, found {shown(medium)}")
            told = _with_medium(told, medium, where)
        elif isinstance(told, dict) and not names_media(told):
            raise RecordError(f"{where}: the column file_name is missing, which names the medium of the row")
        return record_of(told, where, f"{os.path.basename(self._table)}#{self._rows[index][0]}", self._rules)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise RecordError(f"{path}: the caption cannot be read: {error.strerror}") from error


def _csv(content: bytes, path: str) -> list[tuple[int, Any]]:
    """Line and fields of each row."""
    csv.field_size_limit(2**26)
    reader = csv.DictReader(io.StringIO(text_of(content, path), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise RecordError(f"{path}, line {reader.line_num}: has another number of columns than the first line")
            rows.append((reader.line_num, dict(row)))
    except csv.Error as error:
        raise RecordError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
    return rows


def _media(files: list[str], captioned: Mapping[str, Any] | Any) -> set[str]:
    """The media among ``files``: a folder of pictures that has a caption itself is one."""
    found = set()
    for name in files:
        folder, ending = os.path.dirname(name), os.path.splitext(name)[1].lower()
        if ending in READABLE_PICTURES and folder and folder in captioned:
            found.add(folder + os.sep)
        elif ending in MEDIA_ENDINGS:
            found.add(name)
    return found


def _stem(medium: str) -> str:
    return medium.rstrip(os.sep) if medium.endswith(os.sep) else os.path.splitext(medium)[0]


def _repeated(stems: Any) -> set[str]:
    return {stem for stem, times in Counter(stems).items() if times > 1}


def _with_medium(told: Any, medium: str, where: str) -> Any:
    """The record ``told`` with its medium."""
    if not isinstance(told, dict):
        return told  # which is told to be no record
    if names_media(told):
        raise RecordError(f"{where}: names media itself, and belongs to {medium}; leave one of the two out")
    is_picture = os.path.splitext(medium)[1].lower() in READABLE_PICTURES
    return told | {"image" if is_picture else "video": medium.rstrip(os.sep)}

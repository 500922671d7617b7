"""Training samples from LLaVA-format JSON and JSONL files.

A record is ``{"id": ..., "image" | "images" | "video": path or paths, "conversations": [{"from": "human" | "gpt" | "system",
"value": text}, ...]}``. ``placement.py`` has the rules for the markers ``<image>`` and ``<video>`` in the text. A record without
media is a text sample.

Only the place of each record in its file is kept in memory (24 bytes a record); text is read when it is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from megatron_vila.data.placement import IMAGE, PlacementError, Turn, place_media

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


class RecordError(ValueError):
    """A record that cannot be used; the message names the file, the record and the field."""


@dataclass(frozen=True)
class Media:
    """One image or video file."""

    path: str
    is_video: bool


@dataclass(frozen=True)
class Record:
    """One sample with its media placed: ``media[k]`` belongs to the k-th marker of the human turns."""

    sample_id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]


class RecordFiles(Sequence[Record]):
    """The records of several files, one file after the other.

    Every record is read and checked once when the object is made, so that a mistake in a file ends a run at its start, on
    every rank alike. Reading a record opens its file anew: any number of threads may read at once. ``media_format`` is the rule
    by which media are placed.

    Raises ``RecordError`` for a file that is missing, empty or not JSON, and for a record that breaks the format.
    """

    def __init__(self, paths: Sequence[str], media_dir: str = "", media_format: str = "vila") -> None:
        if not paths:
            raise RecordError(
                "no file with samples was given; set data.train to at least one LLaVA-format JSON or JSONL file"
            )
        self.paths = tuple(os.fspath(p) for p in paths)
        self._media_format = media_format
        self._media_dirs = tuple(media_dir or os.path.dirname(os.path.abspath(p)) for p in self.paths)
        tables = [np.array(list(_places(path)), dtype=np.int64).reshape(-1, 3) for path in self.paths]
        for path, table in zip(self.paths, tables, strict=True):
            if not len(table):
                raise RecordError(f"{path}: the file holds no record")
        self._starts = np.cumsum([0, *map(len, tables)])
        self._places = np.concatenate(tables)
        for file, path in enumerate(self.paths):
            with open(path, "rb") as stream:
                for place in tables[file]:
                    self._read(stream, file, place)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        with open(self.paths[file], "rb") as stream:
            return self._read(stream, file, self._places[index])

    def _read(self, stream: BinaryIO, file: int, place: np.ndarray) -> Record:
        offset, size, number = place.tolist()
        path = self.paths[file]
        where = f"{path}, {'line' if path.endswith('.jsonl') else 'record'} {number}"
        stream.seek(offset)
        content = _parse_json(stream.read(size), where)
        name = f"{os.path.basename(path)}#{number}"
        return parse_record(content, where, name, self._media_dirs[file], self._media_format)


def parse_record(content: Any, where: str, default_id: str, media_dir: str, media_format: str = "vila") -> Record:
    """Bring one parsed JSON record into the form of ``Record``; relative media paths start at ``media_dir``.

    ``media_format`` is the rule by which media are placed.

    Raises ``RecordError`` that begins with ``where`` and names the field.
    """
    if not isinstance(content, dict):
        raise RecordError(f"{where}: a record must be a JSON object, found {type(content).__name__}")
    if content.get("image") is not None and content.get("images") is not None:
        raise RecordError(f"{where}, field 'images': the record has 'image' as well; keep one of the two")
    images = [Media(p, False) for key in ("image", "images") for p in _paths(content, key, where, media_dir)]
    videos = [Media(p, True) for p in _paths(content, "video", where, media_dir)]
    turns = _turns(content.get("conversations"), f"{where}, field 'conversations'")
    turns, media = _place_media(turns, images, videos, media_format, f"{where}, field 'conversations'")
    given = content.get("id")
    if given is not None and not isinstance(given, str | int):
        raise RecordError(f"{where}, field 'id': must be text or a number, found {type(given).__name__}")
    return Record(default_id if given is None else str(given), turns, media)


def _paths(content: dict[str, Any], field: str, where: str, media_dir: str) -> list[str]:
    value = content.get(field)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for path in values:
        if not isinstance(path, str) or not path:
            raise RecordError(f"{where}, field '{field}': must be a path or a list of paths, found {path!r}")
    return [os.path.join(media_dir, path) for path in values]


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where}: must be a list of turns with at least one turn")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or turn.get("from") not in _ROLES:
            found = turn.get("from") if isinstance(turn, dict) else turn
            raise RecordError(f"{where}, turn {number}: 'from' must be one of {', '.join(_ROLES)}, found {found!r}")
        if not isinstance(turn.get("value"), str):
            raise RecordError(f"{where}, turn {number}: 'value' must be text, found {turn.get('value')!r}")
        if turn["from"] == "system" and number > 1:
            raise RecordError(f"{where}, turn {number}: a system turn must be the first one")
        turns.append(Turn(_ROLES[turn["from"]], turn["value"]))
    return tuple(turns)


def _place_media(
    turns: tuple[Turn, ...], images: list[Media], videos: list[Media], rule: str, where: str
) -> tuple[tuple[Turn, ...], tuple[Media, ...]]:
    """The turns with a marker for each medium, and the media in the order of their markers."""
    try:
        turns, markers = place_media(turns, len(images), len(videos), rule)
    except PlacementError as error:
        raise RecordError(f"{where}: {error}") from error
    left = {True: iter(images), False: iter(videos)}
    return turns, tuple(next(left[marker == IMAGE]) for marker in markers)


def _places(path: str) -> Iterator[tuple[int, int, int]]:
    """Byte offset, byte size and number (from 1; the line in a JSONL file) of each record of a file."""
    try:
        if path.endswith(".jsonl"):
            yield from _places_in_lines(path)
        elif path.endswith(".json"):
            yield from _places_in_array(path)
        else:
            raise RecordError(f"{path}: the name must end in .json (one list of records) or .jsonl (one record a line)")
    except OSError as error:
        raise RecordError(f"{path}: the file with samples cannot be read: {error.strerror}") from error


def _places_in_lines(path: str) -> Iterator[tuple[int, int, int]]:
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield offset, len(line), number
            offset += len(line)


def _places_in_array(path: str) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 text: {error}") from error
    offset = len(content) - len(text.encode())
    del content
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at = space.match(text).end()
    if text[at : at + 1] != "[":
        raise RecordError(
            f"{path}: a .json file must hold one list of records; name a file with one record a line .jsonl"
        )
    done, at, number = 0, space.match(text, at + 1).end(), 1
    while text[at : at + 1] != "]":
        try:
            end = decoder.raw_decode(text, at)[1]
        except json.JSONDecodeError as error:
            raise RecordError(f"{path}, record {number}: not JSON: {error}") from error
        offset += len(text[done:at].encode())
        size = len(text[at:end].encode())
        yield offset, size, number
        offset, done = offset + size, end
        at, number = space.match(text, end).end(), number + 1
        if text[at : at + 1] == ",":
            at = space.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise RecordError(f"{path}, record {number}: the list breaks off; expected ',' or ']'")


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{where}: not JSON: {error}") from error

"""Training samples from LLaVA-format JSON and JSONL files.

A record is ``{"id": ..., "image" | "video": path or paths, "conversations": [{"from": "human" | "gpt" | "system",
"value": text}, ...]}``. ``fields.py`` has the other spellings, ``placement.py`` the rules for the markers ``<image>`` and
``<video>`` in the text. A record without media is a text sample.

Only the place of each record in its file is kept in memory (24 bytes a record); text is read when it is asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import Media, check_text, read_fields, refuse_media, shown, whole_number
from megatron_vila.data.placement import IMAGE, PlacementError, Turn, place_media
from megatron_vila.data.places import RecordError, record_places

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# An id is a name in logs, where a line belongs to one sample.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

SHOWN_BAD = 10
"""So many bad records stand in a message; all of them in the file that goes with it."""


class BadRecordsError(RecordError):
    """Records that cannot be used, where none may be bad or all are; ``bad`` as in ``RecordFiles``."""

    def __init__(self, message: str, bad: Mapping[int, str]) -> None:
        super().__init__(message)
        self.bad = bad


@dataclass(frozen=True)
class Record:
    """One sample with its media placed: ``media[k]`` belongs to the k-th marker of the human turns."""

    sample_id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]


class RecordFiles(Sequence[Record]):
    """The records of several files, one file after the other.

    Every record is read and checked once when the object is made, so that mistakes in a file are told at the start of a run,
    all of them and on every rank alike: ``bad`` maps the index of a record that cannot be used to file, number, field and
    reason. ``skip_bad`` lets the object be made nevertheless; asking for a bad record then raises ``RecordError``. Reading a
    record opens its file anew: any number of threads may read at once. ``media_format`` is the rule by which media are placed;
    fields named in ``ignore_fields`` are not looked at.

    Raises ``RecordError`` for a file that is missing, empty or no list of records, ``BadRecordsError`` for bad records where
    they are not skipped or where no record is good.
    """

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
        self._media_format, self._ignored = media_format, frozenset(ignore_fields)
        self._media_dirs = tuple(media_dir or os.path.dirname(os.path.abspath(p)) for p in self.paths)
        tables = [record_places(path) for path in self.paths]
        self._starts = np.cumsum([0, *map(len, tables)])
        self._places = np.concatenate(tables)
        self.bad = self._check()
        if self.bad and (len(self.bad) == len(self) or not skip_bad):
            raise BadRecordsError(report_bad_records(self.bad, len(self)), self.bad)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        file = self._file_of(index)
        with open(self.paths[file], "rb") as stream:
            return self._read(stream, file, self._places[index])

    def good(self) -> Iterator[Record]:
        """The records that can be used, in order."""
        return (self[index] for index in range(len(self)) if index not in self.bad)

    def name(self, index: int) -> str:
        """File and number of a record, for messages; good and bad records have one."""
        file = self._file_of(index)
        path = self.paths[file]
        return f"{path}, {'line' if path.endswith('.jsonl') else 'record'} {self._places[index][2]}"

    def _file_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _check(self) -> dict[int, str]:
        """Read every record once; what is wrong with the bad ones."""
        bad = {}
        for file, path in enumerate(self.paths):
            with open(path, "rb") as stream:
                for index in range(self._starts[file], self._starts[file + 1]):
                    try:
                        self._read(stream, file, self._places[index])
                    except RecordError as error:
                        bad[index] = str(error)
        return bad

    def _read(self, stream: BinaryIO, file: int, place: np.ndarray) -> Record:
        offset, size, number = place.tolist()
        path = self.paths[file]
        where = f"{path}, {'line' if path.endswith('.jsonl') else 'record'} {number}"
        stream.seek(offset)
        text = stream.read(size)
        try:
            content = _parse_json(text, where)
            if self._ignored and isinstance(content, dict):
                content = {name: value for name, value in content.items() if name not in self._ignored}
            name = f"{os.path.basename(path)}#{number}"
            return parse_record(content, where, name, self._media_dirs[file], self._media_format)
        except (RecordError, MemoryError):
            raise
        except Exception as error:
            raise RecordError(f"{where}: {type(error).__name__}: {error}") from error


def open_records(data: DataConfig, files: Sequence[str]) -> RecordFiles:
    """The records of ``files`` by the settings of a run. Raises ``RecordError``."""
    return RecordFiles(files, data.media_dir, data.media_format, data.bad_records == "skip", data.ignore_fields)


def report_bad_records(bad: Mapping[int, str], records: int) -> str:
    """How many of ``records`` are bad and what is wrong with the first of them."""
    lines = [f"{len(bad)} of {records} records cannot be used:", *list(bad.values())[:SHOWN_BAD]]
    if len(bad) > SHOWN_BAD:
        lines.append(f"... and {len(bad) - SHOWN_BAD} more")
    return "\n  ".join(lines)


def parse_record(content: Any, where: str, default_id: str, media_dir: str, media_format: str = "vila") -> Record:
    """Bring one parsed JSON record into the form of ``Record``; relative media paths start at ``media_dir``.

    ``media_format`` is the rule by which media are placed.

    Raises ``RecordError`` that begins with ``where`` and names the field.
    """
    if not isinstance(content, dict):
        raise RecordError(f"{where}: a record must be a JSON object, found {type(content).__name__}")
    fields = read_fields(content, where, media_dir)
    turns = _turns(content.get("conversations"), f"{where}, field 'conversations'")
    if fields.system is not None:
        if turns[0].role == "system":
            raise RecordError(
                f"{where}, field 'system': the conversation begins with a system turn; keep one of the two"
            )
        check_text(fields.system, f"{where}, field 'system'")
        turns = (Turn("system", fields.system), *turns)
    turns, media = _place_media(turns, fields.images, fields.videos, media_format, f"{where}, field 'conversations'")
    return Record(_sample_id(content.get("id"), default_id, f"{where}, field 'id'"), turns, media)


def _sample_id(given: Any, default: str, where: str) -> str:
    if given is None or given == "":
        return default
    if isinstance(given, float) and whole_number(given):
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RecordError(f"{where}: must be text or a whole number, found {shown(given)}")
    check_text(str(given), where)
    return _UNSEEN.sub(" ", str(given))


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where}: must be a list of turns with at least one turn")
    turns = []
    for number, turn in enumerate(value, start=1):
        here = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            raise RecordError(f"{here}: must be an object with 'from' and 'value', found {shown(turn)}")
        role = turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise RecordError(f"{here}: 'from' must be one of {', '.join(_ROLES)}, found {shown(role)}")
        if not isinstance(turn.get("value"), str):
            raise RecordError(f"{here}: 'value' must be text, found {shown(turn.get('value'))}")
        if role == "system" and number > 1:
            raise RecordError(f"{here}: a system turn must be the first one")
        check_text(turn["value"], here)
        refuse_media(turn, here)
        turns.append(Turn(_ROLES[role], turn["value"]))
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


def _parse_json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: not JSON: not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise RecordError(f"{where}: not JSON that can be read: lists or objects are nested too deeply") from error
    except ValueError as error:
        raise RecordError(f"{where}: not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} stands twice in one object")
    return found

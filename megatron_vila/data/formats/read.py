"""A record of any known shape, from its JSON text.

``SHAPES`` lists the shapes: a record has the first one whose fields it holds. Each has a reader that makes a draft of a record,
its turns and media; what follows is the same for all. ``docs/formats.md`` shows every shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vila.data.fields import RecordError, check_text, lists_media, shown, whole_number
from megatron_vila.data.formats import conversation, document, question
from megatron_vila.data.formats.draft import Draft
from megatron_vila.data.formats.parts import name_their_files
from megatron_vila.data.placement import IMAGE, PlacementError, place_media, unreadable
from megatron_vila.data.records import Record, RecordRules


@dataclass(frozen=True)
class Shape:
    """One way to write a record: a record with something in one of ``fields`` has it. ``read(content, field, where, media_dir)``
    makes a draft of such a record, where ``field`` is the one it was known by."""

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, str, str], Draft]


def _read_texts(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """Both OBELICS and The Cauldron call a list of theirs so."""
    texts = content[field]
    rounds = isinstance(texts, list) and texts and isinstance(texts[0], dict)
    return (question.read_rounds if rounds else document.read_blocks)(content, field, where, media_dir)


SHAPES = (
    Shape(("conversations", "messages", "conversation"), conversation.read_turns),
    Shape(("query", "instruction"), question.read_question),
    Shape(document.INTERLEAVED[:1], document.read_sentences),
    Shape(document.INTERLEAVED[1:], _read_texts),
    Shape(document.WRITTEN, document.read_text),
)
"""What comes first counts: a ``text`` beside ``conversations`` is a note."""

_BY_FIELD = {name: shape for shape in SHAPES for name in shape.fields}
FIELDS = frozenset(_BY_FIELD)
"""The fields of which a record has one at least."""


def read_record(text: bytes, where: str, default_id: str, rules: RecordRules) -> Record:
    """The record with the JSON ``text``. Raises ``RecordError`` that begins with ``where``, whatever is wrong with it."""
    try:
        return record_of(parse_json(text, where), where, default_id, rules)
    except (RecordError, MemoryError):
        raise
    except Exception as error:
        raise RecordError(f"{where}: {type(error).__name__}: {error}") from error


def record_of(content: Any, where: str, default_id: str, rules: RecordRules) -> Record:
    """The record that one parsed JSON object holds, by ``rules``. Raises ``RecordError`` that begins with ``where``."""
    if rules.ignore_fields:
        content = without_fields(content, rules.ignore_fields)
    return parse_record(content, where, default_id, rules.media_dir, rules.media_format)


def parse_record(content: Any, where: str, default_id: str, media_dir: str, media_format: str = "vila") -> Record:
    """Bring one parsed JSON record into the form of ``Record``; relative media paths start at ``media_dir``.

    ``media_format`` is the rule by which media are placed.

    Raises ``RecordError`` that begins with ``where`` and names the field.
    """
    if not isinstance(content, dict):
        raise RecordError(f"{where}: a record must be a JSON object, found {type(content).__name__}")
    shape, field = _shape(content, where)
    draft = shape.read(content, field, where, media_dir)
    if problem := next(filter(None, (unreadable(turn.text) for turn in draft.turns)), ""):
        raise RecordError(f"{where}, field '{field}': the text {problem}")
    try:
        turns, markers = place_media(draft.turns, len(draft.images), len(draft.videos), media_format)
    except PlacementError as error:
        raise RecordError(f"{where}, field '{field}': {error}") from error
    left = {True: iter(draft.images), False: iter(draft.videos)}
    media = tuple([next(left[marker == IMAGE]) for marker in markers])
    return Record(_sample_id(content.get("id"), default_id, where), turns, media)


def with_caption(content: dict[str, Any], caption: str | None) -> dict[str, Any]:
    """The record of a medium from the JSON and the caption that stand beside it. The caption is the text where the JSON holds no
    more than notes, as a downloader leaves them."""
    if caption is None or content.keys() & FIELDS - set(document.WRITTEN):
        return content
    return {name: value for name, value in content.items() if name not in document.WRITTEN} | {"text": caption}


def names_media(content: Mapping[str, Any]) -> bool:
    """Whether a record names its media: in a field, in a part of a turn, or among its text."""
    return lists_media(content) or name_their_files(content) or any(name in content for name in document.INTERLEAVED)


def _shape(content: Mapping[str, Any], where: str) -> tuple[Shape, str]:
    """The shape of a record, and the field that says so: the first that holds something, else the first that is there."""
    present = [name for name in content if name in _BY_FIELD]
    if not present:
        wanted = ", ".join(f"'{name}'" for name in _BY_FIELD)
        found = f"the fields are {shown(', '.join(content))}" if content else "the record is empty"
        raise RecordError(f"{where}: nothing to train; one of the fields {wanted} must be there, and {found}")
    if len(present) > 1:
        filled = [name for name in present if content[name]] or present
        present = sorted(filled, key=list(_BY_FIELD).index)
        for other in present[1:]:
            if _BY_FIELD[other] is _BY_FIELD[present[0]]:
                raise RecordError(f"{where}, field '{other}': the record has '{present[0]}' as well; keep one of the two")
    return _BY_FIELD[present[0]], present[0]


_OF_TURNS = frozenset({"from", "value", "role", "content", "type", "text", "image", "video"})


def without_fields(content: Any, names: frozenset[str]) -> Any:
    """``content`` without the fields ``names`` of a record, and of its turns and their parts if these can do without them."""
    if isinstance(content, list):
        return [without_fields(part, names - _OF_TURNS) for part in content]
    if isinstance(content, dict):
        return {
            name: without_fields(value, names) if isinstance(value, list) else value
            for name, value in content.items()
            if name not in names
        }
    return content


# An id is a name in logs, where a line belongs to one sample.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def _sample_id(given: Any, default: str, where: str) -> str:
    if given is None or given == "":
        return default
    if isinstance(given, float) and whole_number(given):
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise RecordError(f"{where}, field 'id': must be text or a whole number, found {shown(given)}")
    name = str(given)
    if name.isprintable():
        return name
    check_text(name, f"{where}, field 'id'")
    return _UNSEEN.sub(" ", name)


def parse_json(content: bytes, where: str) -> Any:
    """What JSON text holds. Raises ``RecordError`` that begins with ``where``."""
    try:
        return _JSON.decode(content.removeprefix(_BOM).decode())
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


_BOM = b"\xef\xbb\xbf"
_JSON = json.JSONDecoder(object_pairs_hook=_unique)

"""A training sample in LLaVA format, from its JSON text.

A record is ``{"id": ..., "image" | "video": path or paths, "conversations": [{"from": "human" | "gpt" | "system",
"value": text}, ...]}``. ``fields.py`` has the other spellings, ``placement.py`` the rules for the markers ``<image>`` and
``<video>`` in the text. A record without media is a text sample. ``sources/`` is where records come from.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_vila.data.fields import Media, RecordError, check_text, read_fields, refuse_media, shown, whole_number
from megatron_vila.data.placement import IMAGE, PlacementError, Turn, place_media

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}

# An id is a name in logs, where a line belongs to one sample.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")

class Record(NamedTuple):
    """One sample with its media placed: ``media[k]`` belongs to the k-th marker of the human turns."""

    sample_id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]


@dataclass(frozen=True)
class RecordRules:
    """How records are read: relative media paths start at ``media_dir``, ``media_format`` is the rule by which media are placed,
    and fields named in ``ignore_fields`` are not looked at."""

    media_dir: str
    media_format: str = "vila"
    ignore_fields: frozenset[str] = frozenset()


def read_record(text: bytes, where: str, default_id: str, rules: RecordRules) -> Record:
    """The record with the JSON ``text``. Raises ``RecordError`` that begins with ``where``, whatever is wrong with it."""
    try:
        content = parse_json(text, where)
        if rules.ignore_fields and isinstance(content, dict):
            content = {name: value for name, value in content.items() if name not in rules.ignore_fields}
        return parse_record(content, where, default_id, rules.media_dir, rules.media_format)
    except (RecordError, MemoryError):
        raise
    except Exception as error:
        raise RecordError(f"{where}: {type(error).__name__}: {error}") from error


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
    name = str(given)
    if name.isprintable():
        return name
    check_text(name, where)
    return _UNSEEN.sub(" ", name)


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


def parse_json(content: bytes, where: str) -> Any:
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

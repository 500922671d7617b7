"""Conversations: LLaVA and ShareGPT (``from``, ``value``), messages of Qwen, ms-swift and OpenAI (``role``, ``content``).

A turn says who speaks and what: ``{"from": "human", "value": text}``, ``{"role": "user", "content": text}``, or a question and
its answer in one object, ``{"human": text, "assistant": text}``. A content may be a list of parts (``parts.py``) with media among
the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vila.data.fields import Fields, Media, RecordError, check_text, read_fields, refuse_media, shown
from megatron_vila.data.formats.draft import Draft
from megatron_vila.data.formats.parts import KINDS, Part, read_parts
from megatron_vila.data.formats.unfit import refuse_unfit, refuse_unfit_turn
from megatron_vila.data.placement import DOCUMENT, IMAGE, MARKED, VIDEO, Turn, escape

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
}
"""Who speaks, by the names that public sets use."""

_TOOLS = frozenset({"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"})
_MARKERS = {"image": IMAGE, "video": VIDEO}

_Said = list[Any]
"""The turns; the text of one may still be a list of ``Part``."""


def read_turns(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """The conversation in ``content[field]`` with the media and the system text of the record."""
    here = f"{where}, field '{field}'"
    said, in_parts = _said(content[field], here, media_dir)
    if field == "messages" and len(said) == 1 and said[0][0] == "assistant":
        said = [Turn(DOCUMENT, said[0].text)]  # so ms-swift writes text for pre-training
    return conversation(content, said, in_parts=in_parts, spoken=(field,), where=where, here=here, media_dir=media_dir)


def conversation(
    content: Mapping[str, Any],
    said: _Said,
    *,
    in_parts: bool,
    spoken: tuple[str, ...],
    where: str,
    here: str,
    media_dir: str,
) -> Draft:
    """A draft of the turns ``said``, with the media and the system text of the record ``content``. The turns stand in its fields
    ``spoken``, which messages call ``here``; ``in_parts`` tells whether any of them is a list of parts."""
    fields = read_fields(content, where, media_dir, spoken)
    refuse_unfit(content, where)
    if fields.system is not None:
        if said[0][0] == "system":
            raise RecordError(
                f"{where}, field 'system': the conversation begins with a system turn; keep one of the two"
            )
        check_text(fields.system, f"{where}, field 'system'")
        said = [Turn("system", fields.system), *said]
    if not in_parts:
        return Draft(tuple(said), fields.images, fields.videos)
    parts = [part for _, text in said if not isinstance(text, str) for part in text if part.kind in KINDS]
    if not parts:
        turns = [Turn(role, text if isinstance(text, str) else "".join(part.text for part in text)) for role, text in said]
        return Draft(tuple(turns), fields.images, fields.videos)
    media = [_of_parts(parts, kind, fields, here) for kind in KINDS]
    return Draft(tuple(Turn(role, _with_markers(role, text)) for role, text in said), *media)


def _said(value: Any, where: str, media_dir: str) -> tuple[_Said, bool]:
    """What is said in the turns ``value``, and whether any of it is a list of parts."""
    if not isinstance(value, list) or not value:
        raise RecordError(f"{where}: must be a list of turns with at least one turn")
    said: _Said = []
    in_parts = False
    for number, turn in enumerate(value, start=1):
        if (plain := _plain_turn(turn)) and (plain.role != "system" or not said):
            if not plain.text.isascii():
                check_text(plain.text, f"{where}, turn {number}")
            said.append(plain)
            continue
        here = f"{where}, turn {number}"
        for name, role, text in _spoken(turn, here):
            if not isinstance(text, str):
                text = _content(name, role, text, here, media_dir)
            else:
                check_text(text, here)
            if role == "system" and said:
                raise RecordError(f"{here}: a system turn must be the first one")
            in_parts |= not isinstance(text, str)
            said.append(Turn(role, text))
    return said, in_parts


def _plain_turn(turn: Any) -> Turn | None:
    """What nearly all turns are, a role and a text and no more. None for the others."""
    try:
        who, what = turn
        if (who == "from" and what == "value") or (who == "role" and what == "content"):
            text = turn[what]
            return Turn(ROLES[turn[who]], text) if isinstance(text, str) else None
    except (KeyError, TypeError, ValueError):
        pass
    return None


def _spoken(turn: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """The field, the role and the content of what is said in a turn, and again for an answer in the same object."""
    if isinstance(turn, dict):
        for who, what in (("from", "value"), ("role", "content")):
            if who in turn:
                yield what, _role(turn[who], who, where), turn.get(what)
                if turn.keys() != {who, what}:
                    refuse_media(turn, where, {who, what})
                    refuse_unfit_turn(turn, where)
                return
        if turn and turn.keys() <= ROLES.keys():
            yield from ((who, ROLES[who], what) for who, what in turn.items())
            return
    raise RecordError(f"{where}: must be an object with 'from' and 'value', or with 'role' and 'content', found {shown(turn)}")


def _role(role: Any, name: str, where: str) -> str:
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if isinstance(role, str) and role in _TOOLS:
        raise RecordError(
            f"{where}: '{name}' is {role}; calls of tools are not trained. Write the call into the answer before it as text, "
            "or leave the record out"
        )
    raise RecordError(f"{where}: '{name}' must be one of {', '.join(ROLES)}, found {shown(role)}")


def _content(name: str, role: str, content: Any, where: str, media_dir: str) -> str | list[Part]:
    if name != "content" or not isinstance(content, list):
        raise RecordError(f"{where}: '{name}' must be text, found {shown(content)}")
    parts = read_parts(content, where, media_dir)
    if role != "user" and any(part.kind in KINDS for part in parts):
        raise RecordError(
            f"{where}: media in a turn of the role {role}; the model writes text alone, and media belong in turns of the user"
        )
    return parts if role == "user" else "".join(part.text for part in parts)


def _of_parts(parts: list[Part], kind: str, fields: Fields, where: str) -> list[Media]:
    """The media of one kind of a record with media in its contents: named there, or listed in the record in the same order."""
    places = [part for part in parts if part.kind == kind]
    listed = fields.images if kind == "image" else fields.videos
    own = [part.medium for part in places if part.medium is not None]
    if own and (listed or len(own) < len(places)):
        raise RecordError(
            f"{where}: {len(own)} of {len(places)} parts of the type {kind} name their file, and the record lists "
            f"{len(listed)}; give all files in one of the two places"
        )
    if not own and len(places) != len(listed):
        raise RecordError(f"{where}: {len(places)} parts of the type {kind} for {len(listed)} files of the record")
    return own or list(listed)


def _with_markers(role: str, content: str | list[Part]) -> str:
    """The text of a turn with a marker for each medium among its parts; markers that are written in its text are words."""
    pieces = [Part("text", content)] if isinstance(content, str) else content
    hide = escape if role in MARKED else str
    return "".join(_MARKERS[part.kind] if part.kind in KINDS else hide(part.text) for part in pieces)

"""A question and its answer in fields of their own: ``query`` and ``response`` with a ``history`` (ms-swift), or
``instruction``, ``input`` and ``output`` (Alpaca)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vila.data.fields import RecordError, check_text, is_empty, refuse_media, shown
from megatron_vila.data.formats.conversation import conversation
from megatron_vila.data.formats.draft import Draft
from megatron_vila.data.placement import Turn


def read_question(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """The conversation that ends with ``content[field]`` and its answer."""
    answer = "response" if field == "query" else "output"
    asked = _text(content, field, where)
    further = "input" if field == "instruction" else ""
    if further and not is_empty(content.get(further)):
        asked += "\n" + _text(content, further, where)
    said = [*_history(content.get("history"), f"{where}, field 'history'"), (asked, _text(content, answer, where))]
    turns = [Turn(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    spoken, here = (field, answer, further, "history"), f"{where}, field '{field}'"
    return conversation(content, turns, in_parts=False, spoken=spoken, where=where, here=here, media_dir=media_dir)


def read_rounds(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """The conversation in ``content[field]``, ``{"user": ..., "assistant": ...}`` for each round (The Cauldron, FineVision)."""
    here, turns = f"{where}, field '{field}'", []
    for number, round_ in enumerate(content[field], start=1):
        place = f"{here}, round {number}"
        if not isinstance(round_, dict):
            raise RecordError(f"{place}: must be an object with 'user' and 'assistant', found {shown(round_)}")
        refuse_media(round_, place, ("user", "assistant"))
        turns += [Turn(role, _text(round_, role, place)) for role in ("user", "assistant")]
    return conversation(content, turns, in_parts=False, spoken=(field,), where=where, here=here, media_dir=media_dir)


def _text(content: Mapping[str, Any], field: str, where: str) -> str:
    value = content.get(field)
    if not isinstance(value, str):
        raise RecordError(f"{where}, field '{field}': must be text, found {shown(value)}")
    check_text(value, f"{where}, field '{field}'")
    return value


def _history(value: Any, where: str) -> list[tuple[str, str]]:
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise RecordError(f"{where}: must be a list of questions with their answers, found {shown(value)}")
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError(f"{where}, round {number}: must be a list of a question and its answer, found {shown(pair)}")
        for text in pair:
            check_text(text, f"{where}, round {number}")
    return [(pair[0], pair[1]) for pair in value]

"""Fields that change what a record should teach in a way that this trainer has not: refused, because a record without them would
teach something else."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megatron_vila.data.fields import RecordError, is_empty, plain_name, shown

_PREFERENCE = "belongs to a pair of a wanted and an unwanted answer, and training here takes one answer alone"
_TOOLS = "defines tools, and the chat template is not told of tools"
_UNFIT = {
    **dict.fromkeys(("rejected", "rejectedresponse", "rejectedmessages", "rejectedimages", "chosen"), _PREFERENCE),
    **dict.fromkeys(("preferredoutput", "nonpreferredoutput"), _PREFERENCE),
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("objects", "bbox"), "is what <bbox> and <ref-object> in the text stand for; write the boxes into the text"),
    "label": "says whether the answer is wanted, and every answer here is trained",
}
_UNFIT_TURN = {
    **dict.fromkeys(("toolcalls", "functioncall"), "is a call of a tool, and calls are not trained"),
    "reasoningcontent": "is what the model thinks before its answer, and only the content is trained",
    "refusal": "is an answer beside the content, and only the content is trained",
}
_PLACEHOLDERS = ("<bbox>", "<ref-object>")


def refuse_unfit(content: Mapping[str, Any], where: str) -> None:
    """Raise ``RecordError`` for a field of a record that cannot be done without."""
    for name in _suspects(tuple(content)):
        plain, value = plain_name(name), content[name]
        if plain == "label":
            unfit = isinstance(value, bool)
        elif plain in ("objects", "bbox"):
            unfit = not _says_nothing(value) and any(word in str(content) for word in _PLACEHOLDERS)
        else:
            unfit = not _says_nothing(value)
        if unfit:
            raise _refused(name, value, _UNFIT[plain], where)


def refuse_unfit_turn(turn: Mapping[str, Any], where: str) -> None:
    """Raise ``RecordError`` for a field of a turn that cannot be done without."""
    for name, value in turn.items():
        plain = plain_name(name)
        if plain in _UNFIT_TURN and not _says_nothing(value):
            raise _refused(name, value, _UNFIT_TURN[plain], where)
        if plain in ("loss", "weight") and value is not None and not value:
            raise _refused(name, value, "leaves this turn out of the training, and every answer here is trained", where)


@functools.lru_cache(maxsize=4096)
def _suspects(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the fields ``names`` that are to be looked at."""
    return tuple(name for name in names if plain_name(name) in _UNFIT)


def _says_nothing(value: Any) -> bool:
    return is_empty(value) or value in ({}, "[]", "{}")


def _refused(name: str, value: Any, why: str, where: str) -> RecordError:
    return RecordError(
        f"{where}, field '{name}': {why}, found {shown(value)}. To train the record without it, list it in data.ignore_fields"
    )

"""A sample of a shard: its record and the files of its media, as members of a tar file.

Key ``K`` is the number of the record in the source, so keys are unique and say where a sample came from. ``K.json`` is a record
in LLaVA's form (a document has its ``text`` in place of turns), each marker where the source has it. Its fields name ``K.0.mp4``,
``K.1.jpg`` ... by their parts (``0.mp4``), numbered in the order of the markers. A video that stayed pictures has the parts
``0.000000.jpg``, ``0.000001.jpg`` ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vila.data.placement import DOCUMENT
from megatron_vila.data.prepare.options import Outcome
from megatron_vila.data.records import Record

_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}

Members = list[tuple[str, bytes | Path]]
"""Names and contents, or the files that hold them."""


def key_of(index: int) -> str:
    return f"{index:09d}"


def members_of(index: int, record: Record, outcomes: Sequence[Outcome]) -> Members:
    """The members of record ``index``, whose media became ``outcomes``; the JSON comes first."""
    key = key_of(index)
    named = [_parts(number, outcome) for number, outcome in enumerate(outcomes)]
    content = json.dumps(_record(record, outcomes, named), ensure_ascii=False).encode()
    files = [
        (f"{key}.{part}", Path(path))
        for parts, outcome in zip(named, outcomes, strict=True)
        for part, (_, path) in zip(parts, outcome.files, strict=True)
    ]
    return [(f"{key}.json", content), *files]


def _parts(number: int, outcome: Outcome) -> list[str]:
    if outcome.kind == "pictures":
        return [f"{number}.{place:06d}.{ending}" for place, (ending, _) in enumerate(outcome.files)]
    return [f"{number}.{ending}" for ending, _ in outcome.files]


def _record(record: Record, outcomes: Sequence[Outcome], named: Sequence[list[str]]) -> dict[str, Any]:
    content: dict[str, Any] = {"id": record.sample_id}
    if record.turns[0].role == DOCUMENT:
        content["text"] = record.turns[0].text
    else:
        content["conversations"] = [{"from": _ROLES[turn.role], "value": turn.text} for turn in record.turns]
    media = list(zip(record.media, outcomes, named, strict=True))
    if images := [parts[0] for medium, _, parts in media if not medium.is_video]:
        content["image"] = images
    videos = [(medium, outcome, parts) for medium, outcome, parts in media if medium.is_video]
    if videos:
        content["video"] = [parts if outcome.kind == "pictures" else parts[0] for _, outcome, parts in videos]
    # Clips are cut out, but of a file that was taken as it is.
    for name, seconds in (("start", "start_s"), ("end", "end_s")):
        bounds = [getattr(m, seconds) if outcome.kind == "original" else None for m, outcome, _ in videos]
        if any(bound is not None for bound in bounds):
            content[name] = bounds
    return content

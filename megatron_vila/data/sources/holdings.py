"""What a prepared set of shards holds, as its ``megatron_vila.json`` says, and what a run would want more of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from megatron_vila.config.schema import Config
from megatron_vila.data.fields import RecordError, shown

FILE = "megatron_vila.json"
CURE = "start the command that prepared the set once more with --finish, which writes this file anew"
FORMAT = 1
"""The format of shards that is written and read."""

_NONE = {"short_side": 0, "fps": 0.0, "picture_side": 0}


@dataclass(frozen=True)
class Holdings:
    """What the media of a set were made into: ``short_side`` pixels of a video's short side, ``fps`` frames of a second of video,
    ``picture_side`` pixels of a picture's long side, each at most and 0 where media were taken as they are. ``media_format`` is
    the rule by which the texts place media."""

    media_format: str = "verbatim"
    short_side: int = 0
    fps: float = 0.0
    picture_side: int = 0


def holdings_of(content: bytes, path: str) -> Holdings:
    """What the text ``content`` of the file ``path`` says. Fields that are not known are left to others.

    Raises ``RecordError`` for a file of another format, or with other values than it has.
    """
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: not JSON: {error}; {CURE}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        found = shown(told.get("format")) if isinstance(told, dict) else shown(told)
        raise RecordError(
            f"{path}: the shards have format {found}, and format {FORMAT} is read here; prepare them with this version, or read "
            "them with that which wrote them"
        )
    known = {field.name: told[field.name] for field in fields(Holdings) if told.get(field.name) is not None}
    for name, value in known.items():
        if name in _NONE and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31):
            raise RecordError(f"{path}, field '{name}': must be a number, 0 or more, found {shown(value)}; {CURE}")
    if known.get("media_format", "verbatim") not in ("vila", "verbatim"):
        raise RecordError(
            f"{path}, field 'media_format': must be vila or verbatim, found {shown(known['media_format'])}; {CURE}"
        )
    return Holdings(**known)


def holdings_warnings(config: Config, held: Mapping[str, Holdings]) -> list[str]:
    """Where the settings of a run want more than the sets ``held`` (by their folders) have."""
    return [f"{folder}: {text}" for folder, holds in held.items() for text in _warnings(config, holds)]


def _warnings(config: Config, holds: Holdings) -> list[str]:
    side, data = config.model.vision.image_size, config.data
    found = []
    for what, kept, option in (
        ("videos have a short side of", holds.short_side, "--short-side"),
        ("pictures have a long side of", holds.picture_side, "--picture-side"),
    ):
        if 0 < kept < side:
            found.append(
                f"its {what} at most {kept} pixels, and the tower reads {side} (model.vision.image_size): they are scaled up. "
                f"Prepare the set with {option} {side}"
            )
    if 0 < holds.fps < data.fps:
        found.append(
            f"its videos have at most {holds.fps:g} frames a second, and data.fps={data.fps:g} asks for more: all of them are "
            f"taken. Prepare the set with --fps {data.fps:g}, or set data.fps={holds.fps:g}"
        )
    if holds.media_format != data.media_format:
        found.append(
            f"its texts place media by the rule {holds.media_format}, and data.media_format={data.media_format} is applied to "
            f"them. Set data.media_format={holds.media_format} to leave them where they are"
        )
    return found

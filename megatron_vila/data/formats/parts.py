"""Parts of a content that is a list: text and media in their order, as Qwen, OpenAI and transformers write them.

``{"type": "text", "text": ...}``, ``{"type": "image", "image": path}``, ``{"type": "image_url", "image_url": {"url": ...}}``,
``{"type": "video", "video": path or pictures}``. A part of a medium without a file stands for the next one that the record lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_vila.data.fields import Media, RecordError, check_text, is_empty, read_fields, refuse_media, shown

KINDS = ("image", "video")

_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
# How a model would scale or sample a medium is decided by the settings of the run.
_NOTES = frozenset(
    {"type", "text", "index", "detail", "metadata", "path", "url", "videostart", "videoend", "fps", "samplefps", "rawfps"}
    | {"nframes", "minframes", "maxframes", "minpixels", "maxpixels", "totalpixels", "resizedheight", "resizedwidth"}
)


class Part(NamedTuple):
    """A piece of ``text``, or a medium: ``kind`` is "text", "image" or "video". A medium of None is listed elsewhere."""

    kind: str
    text: str = ""
    medium: Media | None = None


def read_parts(parts: list[Any], where: str, media_dir: str) -> list[Part]:
    """The parts of a content. Raises ``RecordError`` that begins with ``where``."""
    return [_part(part, f"{where}, part {number}", media_dir) for number, part in enumerate(parts, start=1)]


def name_their_files(content: Mapping[str, Any]) -> bool:
    """Whether a part in a turn of the record ``content`` names the file of its medium."""
    turns = (turn for value in content.values() if isinstance(value, list) for turn in value if isinstance(turn, dict))
    parts = (part for turn in turns for value in turn.values() if isinstance(value, list) for part in value)
    return any(isinstance(part, dict) and (kind := _kind_of(part)) in KINDS and _names(part, kind) for part in parts)


def _part(part: Any, where: str, media_dir: str) -> Part:
    if not isinstance(part, dict):
        raise RecordError(f"{where}: must be an object with a 'type', found {shown(part)}")
    kind = _kind_of(part)
    if kind is None:
        raise RecordError(f"{where}: 'type' must be one of {', '.join(_TYPES)}, found {shown(part.get('type'))}")
    refuse_media(part, where, _NOTES if kind == "text" else _NOTES | {kind, f"{kind}url"})
    if kind != "text":
        return Part(kind, medium=_medium(part, kind, where, media_dir))
    if not isinstance(part.get("text"), str):
        raise RecordError(f"{where}: 'text' must be text, found {shown(part.get('text'))}")
    check_text(part["text"], where)
    return Part(kind, part["text"])


def _kind_of(part: Mapping[str, Any]) -> str | None:
    named = part.get("type") or next((name for name in ("text", *KINDS) if part.get(name)), None)
    return _TYPES.get(named) if isinstance(named, str) else None


def _names(part: Mapping[str, Any], kind: str) -> list[str]:
    """The fields of a part that name its file."""
    return [name for name in (kind, f"{kind}_url", "path", "url") if not is_empty(part.get(name))]


def _medium(part: Mapping[str, Any], kind: str, where: str, media_dir: str) -> Media | None:
    """The file that a part names, None if it names none."""
    names = _names(part, kind)
    if not names:
        return None
    if len(names) > 1:
        raise RecordError(f"{where}: names its file in '{names[0]}' and in '{names[1]}'; keep one of the two")
    value = part[names[0]]
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    given: dict[str, Any] = {kind: value}
    if kind == "video":
        given |= {"start": part.get("video_start"), "end": part.get("video_end")}
        if isinstance(value, list):  # of a file, "fps" is the rate that a model would sample it at
            given["fps"] = next((part[name] for name in ("raw_fps", "sample_fps", "fps") if part.get(name)), None)
    fields = read_fields(given, where, media_dir)
    media = fields.images or fields.videos
    if len(media) != 1:
        raise RecordError(f"{where}: names {len(media)} files; a part stands for one")
    return media[0]

"""The fields of a record that name media: many spellings, clips of videos, videos given as pictures; and what looks like one.

Public sets write the same thing in many ways. A field is known by its name without case, ``_`` and ``-``: ``video``, ``Videos``
and ``video_path`` are one. A field that is not known and looks like media is refused, because a sample whose video is
overlooked would train as text.
"""

from __future__ import annotations

import functools
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from megatron_vila.data.addresses import AddressError, kind_in, source_of
from megatron_vila.data.media import Member
from megatron_vila.errors import UserError

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
VIDEO_ENDINGS = frozenset(
    {".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv", ".wmv", ".3gp", ".ogv"}
)
_OTHER_ENDINGS = frozenset(
    {".gif", ".avif", ".jfif", ".heic", ".heif", ".ppm", ".svg", ".vob", ".mts", ".m2v", ".asf"}
    | {".rm", ".rmvb", ".mxf", ".f4v", ".y4m", ".dv", ".h264", ".hevc"}
    | {".wav", ".mp3", ".flac", ".m4a", ".ogg", ".opus", ".aac", ".wma"}
)
READABLE_PICTURES = PICTURE_ENDINGS | {".gif", ".avif", ".jfif", ".ppm"}
"""What the reader of pictures takes and is no ending of a video, though no field is known by all of these."""
MEDIA_ENDINGS = PICTURE_ENDINGS | VIDEO_ENDINGS | _OTHER_ENDINGS

_NAMES = {
    "image": {"image", "images", "imagepath", "imagepaths", "imagefile", "imagefiles"},
    "video": {"video", "videos", "videopath", "videopaths", "videofile", "videofiles"},
    "frames": {"frames", "videoframes", "framepaths", "framefiles"},
    "fps": {"fps", "videofps"},
    "system": {"system", "systemprompt", "systemmessage"},
    "id": {"id"},
} | {
    word: {
        before + word + unit
        for before in ("", "video", "clip")
        for unit in ("", "s", "sec", "second", "seconds", "time")
    }
    for word in ("start", "end")
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}

_MEDIA_WORD = re.compile("video|image|frame|audio|clip|picture|photo|^(imgs?|medias?)($|path|file|url)")
_CLIP_WORD = re.compile("clip|start|end|begin|range|span|segment")
_BOUND_NAME = re.compile("(video|clip|segment|time|t)?(start|begin|end|finish|stop).*")
_RANGE_NAME = re.compile("(video|clip|time)?(segment|range|span|interval|window|trim|cut|timestamp|moment)")
_RATE_TEXT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?(/[0-9]{1,9})?")
_TIME_TEXT = re.compile(r"[0-9]+([:.,][0-9]+)*s?")


class RecordError(UserError, ValueError):
    """A record or a file of records that cannot be used; the message names the file, the record and the field."""


class Media(NamedTuple):
    """One image or video: ``path`` says where it lies.

    ``start_s`` and ``end_s`` cut a clip out of a video, in seconds from its first frame, both ends included. ``pictures`` are
    the files of a video that was given as a list of pictures; ``path`` is then their folder. (A ``path`` that is a folder is
    such a video too; its files are looked up when they are needed.) ``fps`` is the rate at which such pictures were taken. In a
    shard, ``path`` and ``pictures`` are members of it.
    """

    path: str | Member | bytes
    is_video: bool
    start_s: float | None = None
    end_s: float | None = None
    fps: float | None = None
    pictures: tuple[str | Member | bytes, ...] = ()


class Fields(NamedTuple):
    """What the fields of a record beside its conversation say."""

    images: list[Media]
    videos: list[Media]
    system: str | None


def shown(value: Any) -> str:
    """``value`` for a message: one line of limited length, whatever it is."""
    return _SHORT.repr(value)


def read_fields(content: Mapping[str, Any], where: str, media_dir: str, spoken: Collection[str] = ()) -> Fields:
    """The media and the system text of a record; relative paths start at ``media_dir``. The fields ``spoken`` hold what is said.

    Raises ``RecordError`` that begins with ``where`` and names the field.
    """

    given: dict[str, list[str]] = {}
    for name, value in content.items():
        if (kind := _kind(name)) and not is_empty(value):
            given.setdefault(kind, []).append(name)

    def take(kind: str) -> tuple[str, Any]:
        """Name and value of the one field of a kind that says anything."""
        names = given.get(kind)
        if names is None:
            return "", None
        if len(names) > 1:
            raise RecordError(f"{where}, field '{names[1]}': the record has '{names[0]}' as well; keep one of the two")
        return names[0], content[names[0]]

    name, value = take("image")
    images = [Media(path, False) for path in _images(value, f"{where}, field '{name}'", media_dir)]
    name, value = take("video")
    videos = _videos(value, f"{where}, field '{name}'", media_dir)
    name, value = take("frames")
    if value is not None and not isinstance(value, int | float):  # a number says how many there are
        if videos:
            raise RecordError(f"{where}, field '{name}': the record has a video as well; keep one of the two")
        videos = [_frames(value, f"{where}, field '{name}'", media_dir)]
    if not given.keys().isdisjoint(("start", "end", "fps")):
        clips = [_of_each_video(*take(kind), len(videos), _seconds, where) for kind in ("start", "end")]
        rates = _of_each_video(*take("fps"), len(videos), _rate, where)
        videos = [
            _cut(video, start_s, end_s, fps, where)
            for video, start_s, end_s, fps in zip(videos, *clips, rates, strict=True)
        ]
    name, system = take("system")
    if system is not None and not isinstance(system, str):
        raise RecordError(f"{where}, field '{name}': must be text, found {shown(system)}")
    _refuse_unknown(content, where, spoken)
    if videos:
        _refuse_other_clips(content, where)
    return Fields(images, videos, system)


def lists_media(content: Mapping[str, Any]) -> bool:
    """Whether a field of a record is one that lists media."""
    given = ((_kind(name), value) for name, value in content.items() if not is_empty(value))
    return any(kind in ("image", "video") or (kind == "frames" and not isinstance(value, int | float)) for kind, value in given)


def refuse_media(content: Mapping[str, Any], where: str, known: Collection[str]) -> None:
    """Raise ``RecordError`` for a field that looks like media, where none belongs (in a turn) but in those of the plain names
    ``known``."""
    _refuse_unknown(content, where, (), known)


def check_text(text: str, where: str) -> None:
    """Raise ``RecordError`` for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    if text.isascii():  # known without looking at the text
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RecordError(f"{where}: {half} is half of a character (a surrogate without its other half)") from None


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


@functools.lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """A name of a field without case, ``_`` and ``-``."""
    return re.sub(r"[\s_-]", "", name.lower())


@functools.lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """What a field says by its name: a key of ``_NAMES``, "" if it is not known."""
    return _KINDS.get(plain_name(name), "")


def is_empty(value: Any) -> bool:
    """Whether a field counts as not given."""
    return value is None or value == "" or value == []


def source(value: Any, where: str, media_dir: str) -> str | bytes:
    """Where the medium lies that ``value`` names (``addresses.py``). Raises ``RecordError`` that begins with ``where``."""
    if isinstance(value, str) and value.isascii() and value and ":" not in value and "\0" not in value:
        return os.path.join(media_dir, value)  # what nearly all are
    try:
        found = source_of(value, media_dir)
    except AddressError as error:
        if not str(error):
            raise RecordError(f"{where}: must be a path or a list of paths, found {shown(value)}") from None
        raise RecordError(f"{where}: {shown(value)} {error}") from error
    if isinstance(found, str):
        check_text(found, where)
    return found


def _ending(path: str) -> str:
    """As ``os.path.splitext``, which takes three times as long, in lower case."""
    _, dot, ending = path.rpartition("/")[2].lstrip(".").rpartition(".")
    return dot + ending.lower() if dot else ""


def _images(value: Any, where: str, media_dir: str) -> list[str | bytes]:
    if value is None:
        return []
    paths = [source(v, where, media_dir) for v in (value if isinstance(value, list) else [value])]
    for path in paths:
        if isinstance(path, str) and _ending(path) in VIDEO_ENDINGS:
            raise RecordError(f"{where}: {shown(path)} is a video by its name; give it in the field 'video'")
    return paths


def _videos(value: Any, where: str, media_dir: str) -> list[Media]:
    """The videos of a field: a path (of a file, or of a folder of pictures), a list of them, or a list of pictures, which are
    the frames of one video. A list in a list is a video of pictures too."""
    if value is None:
        return []
    if not isinstance(value, list):
        value = [value]
    are_pictures = [_is_picture(v) for v in value]
    if all(are_pictures):
        return [_frames(value, where, media_dir)]
    if any(are_pictures):
        raise RecordError(
            f"{where}: pictures and videos in one list; write the pictures of one video as a list of their own"
        )
    return [
        _frames(v, where, media_dir) if isinstance(v, list) else Media(source(v, where, media_dir), True) for v in value
    ]


def _frames(value: Any, where: str, media_dir: str) -> Media:
    """One video from the path of a folder, or from the list of its pictures in the order of time."""
    if isinstance(value, str) and not _is_picture(value):
        return Media(source(value, where, media_dir), True)
    pictures = tuple(source(v, where, media_dir) for v in (value if isinstance(value, list) else [value]))
    for path in pictures:
        if isinstance(path, str) and _ending(path) not in PICTURE_ENDINGS:
            raise RecordError(
                f"{where}: {shown(path)} is not a picture by its name; the frames of a video must be pictures"
            )
    if not pictures:
        raise RecordError(f"{where}: a video of pictures needs at least one")
    first = pictures[0]
    return Media(os.path.dirname(first) if isinstance(first, str) else first, True, pictures=pictures)


def _is_picture(value: Any) -> bool:
    """Whether a text names a picture, by its ending or its kind."""
    return isinstance(value, str) and (_ending(value) in PICTURE_ENDINGS or value.startswith("data:image/"))


def _of_each_video(
    name: str, value: Any, videos: int, read: Callable[[Any, str], float | None], where: str
) -> list[float | None]:
    """What ``read`` makes of the value for each video; a single one may stand without a list."""
    if value is None:
        return [None] * videos
    where = f"{where}, field '{name}'"
    if not videos:
        if _kind(name) == "fps":
            return []
        raise RecordError(f"{where}: the record has no video to take a clip of")
    values = value if isinstance(value, list) else [value]
    if len(values) != videos:
        raise RecordError(f"{where}: {len(values)} values for {videos} videos; give a list with one for each video")
    return [None if is_empty(one) else read(one, where) for one in values]


def _seconds(value: Any, where: str) -> float:
    if not _is_number(value):
        raise RecordError(f"{where}: must be a number of seconds, 0 or more, found {shown(value)}")
    return float(value)


def _rate(value: Any, where: str) -> float | None:
    """Frames per second of a number or a fraction such as "30000/1001", which ffprobe writes; 0 and "0/0" say that it is not
    known."""
    if isinstance(value, str) and _RATE_TEXT.fullmatch(value.strip()):
        above, _, below = value.partition("/")
        value = float(above) / float(below or 1) if float(below or 1) else 0
    if not _is_number(value):
        raise RecordError(
            f'{where}: must be a rate as 30, 29.97 or "30000/1001", or 0 where it is not known, found {shown(value)}'
        )
    return float(value) or None


def _is_number(value: Any) -> bool:
    # A whole number of a thousand digits is no float, and comparing it with one raises.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e12


def _cut(video: Media, start_s: float | None, end_s: float | None, fps: float | None, where: str) -> Media:
    if start_s is not None and end_s is not None and start_s >= end_s:
        raise RecordError(f"{where}: the clip of {shown(video.path)} starts at {start_s:g} s and ends at {end_s:g} s")
    return Media(video.path, True, start_s, end_s, fps, video.pictures)


def _refuse_unknown(
    content: Mapping[str, Any], where: str, spoken: Collection[str], known: Collection[str] = _KINDS.keys()
) -> None:
    for name, value in content.items():
        plain = plain_name(name)
        if plain in known or name in spoken or is_empty(value):
            continue
        file = next((text for text in _texts(value) if _is_medium(text)), None)
        if file is not None:
            found = f"holds the media file {shown(file)}"
        elif _MEDIA_WORD.search(plain) and _says_media(plain, value):
            found = f"looks like media and is not known, found {shown(value)}"
        else:
            continue
        raise RecordError(
            f"{where}, field '{name}': {found}; media belong in 'image', 'video' or 'frames' of the record, clips in "
            f"'start' and 'end' (seconds). If it is none, list it in data.ignore_fields"
        )


def _refuse_other_clips(content: Mapping[str, Any], where: str) -> None:
    """Raise ``RecordError`` for a field that seems to cut a clip of a video under a name that is not known."""
    for name, value in content.items():
        bound_name, range_name = _clip_names(name)
        bound = bound_name and _is_time(value)
        pair = range_name and isinstance(value, list) and len(value) == 2 and all(map(_is_time, value))
        if bound or pair:
            raise RecordError(
                f"{where}, field '{name}': seems to cut a clip and is not known, found {shown(value)}; a clip is given in "
                "'start' and 'end' (seconds). If it is none, list it in data.ignore_fields"
            )


@functools.lru_cache(maxsize=4096)
def _clip_names(name: str) -> tuple[bool, bool]:
    """Whether a field that is not known may give an end of a clip by its name, and whether both ends."""
    plain = plain_name(name)
    if plain in _KINDS or plain.endswith(("id", "ids", "idx", "index")):
        return False, False
    return bool(_BOUND_NAME.fullmatch(plain)), bool(_RANGE_NAME.fullmatch(plain))


def _is_time(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_TIME_TEXT.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _says_media(plain: str, value: Any) -> bool:
    """Whether a field with a name such as *video* can be more than a note: numbers are notes, unless they cut a clip."""
    if isinstance(value, bool) or plain.endswith(("id", "ids", "idx", "index")):
        return False
    numbers = value if isinstance(value, list) else [value]
    return not all(isinstance(number, int | float) for number in numbers) or bool(_CLIP_WORD.search(plain))


def _is_medium(value: str | bytes) -> bool:
    """Whether a text in an unknown field is the name of a medium or one itself, as bytes are."""
    return isinstance(value, bytes) or _ending(value) in MEDIA_ENDINGS or bool(kind_in(value))


def _texts(value: Any, depth: int = 3) -> Iterator[str | bytes]:
    """The texts and bytes in ``value``, at most ``depth`` lists or objects deep."""
    if isinstance(value, str | bytes):
        yield value
    elif isinstance(value, list | dict) and depth:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part, depth - 1)


def whole_number(value: float) -> bool:
    return math.isfinite(value) and value == int(value)

"""The media that a caller gives to the processor: in which forms they come, which text each belongs to, and their pictures.

An image is a path, a ``file://`` or ``data:`` address, a PIL picture or a uint8 array [H, W, 3] or [3, H, W]; a video is a path,
a list of pictures or a uint8 array [N, H, W, 3] or [N, 3, H, W]. In a part of a message the pictures of a video may be paths too.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from megatron_vila.data.images import as_rgb, load_image
from megatron_vila.data.placement import IMAGE, VIDEO, escape
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video import decode_video_frames, probe_video


class Frames(tuple):
    """The pictures of one video, in order, in any form of a picture."""


def text_and_media(messages: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Any], list[Any]]:
    """The contents of messages as texts with markers, and the images and videos that the messages hold as parts.

    Markers written in the texts of a message that is a list of parts are plain words, and in all texts if any message holds an
    image or a video. A part that names no medium gives None. Raises ``ValueError`` for a part of another type, and for media in a
    message of another role than ``user``.
    """
    contents = [message.get("content") or "" for message in messages]
    has_media = any(part.get("type") != "text" for content in contents if not isinstance(content, str) for part in content)
    images: list[Any] = []
    videos: list[Any] = []
    texts = []
    for message, content in zip(messages, contents, strict=True):
        human = message["role"] == "user"
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "text":
                words = human and (has_media or not isinstance(content, str))
                text += escape(part["text"]) if words else part["text"]
                continue
            medium, marker = _medium(part)
            if not human:
                raise ValueError(f"a message of role {message['role']!r} holds {marker}; media belong to the role 'user'")
            (images if marker == IMAGE else videos).append(medium)
            text += marker
        texts.append(text)
    return texts, images, videos


def _medium(part: Mapping[str, Any]) -> tuple[Any, str]:
    """The medium in a part of a message, and its marker."""
    kind = part.get("type")
    if kind not in ("image", "video", "image_url", "video_url"):
        raise ValueError(f"a part of a message has type={kind!r}; use text, image, video, image_url or video_url")
    marker = IMAGE if kind.startswith("image") else VIDEO
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64'].rpartition(',')[2]}", marker
    medium = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    if kind.endswith("_url") and isinstance(medium, Mapping):
        medium = medium.get("url")
    if marker == VIDEO and isinstance(medium, list | tuple):
        medium = Frames(medium)
    return medium, marker


def in_place_of_none(in_parts: list[Any], given: list[Any]) -> list[Any]:
    """The media of a conversation's parts; those ``given`` beside it take the places of parts that name none.

    Parts stay None if nothing is given. Raises ``ValueError`` if the numbers differ.
    """
    empty = sum(medium is None for medium in in_parts)
    if given and not empty:
        raise ValueError("media are given both in the messages and in images or videos; give them in one place only")
    if given and len(given) != empty:
        raise ValueError(f"the messages hold {empty} parts that name no medium, but {len(given)} media are given beside them")
    rest = iter(given)
    return [next(rest, None) if medium is None else medium for medium in in_parts]


def of_each_conversation(media: Any, is_one: Callable[[Any], bool], several: bool, count: int) -> list[list[Any]]:
    """The media of each of ``count`` conversations.

    ``media`` is a list for each conversation if there are ``several``, else one medium (``is_one``) or a list. Raises
    ``ValueError`` if there is not a list for each.
    """
    if media is None:
        return [[] for _ in range(count)]
    if not several:
        return [[media] if is_one(media) else list(media)]
    if not isinstance(media, list | tuple) or len(media) != count:
        raise ValueError(f"media are not given by conversation; give a list of them for each of the {count} conversations")
    return [list(own) for own in media]


def of_each_text(media: Any, counts: Sequence[int], is_one: Callable[[Any], bool], marker: str) -> list[list[Any]]:
    """The media of each text, from one medium, one list for all texts, or a list for each text.

    ``counts`` are the numbers of ``marker`` in the texts; ``is_one`` says whether a value is one medium. Raises ``ValueError``
    if the media do not fit the markers, or a value is not a medium.
    """
    if media is None:
        media = []
    elif is_one(media):
        media = [media]
    per_text = len(media) == len(counts) and all(isinstance(own, list | tuple) and not is_one(own) for own in media)
    if per_text:
        shared = [list(own) for own in media]
    else:
        ends = np.cumsum(counts).tolist()
        shared = [list(media[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    given = [len(own) for own in shared] if per_text else [len(media)]
    if given != (list(counts) if per_text else [sum(counts)]):
        raise ValueError(
            f"the texts hold {list(counts)} markers {marker}, but {given} media are given; give one medium for each marker"
        )
    wrong = next((one for own in shared for one in own if not is_one(one)), None)
    if wrong is not None:
        raise ValueError(
            f"{type(wrong).__name__} {getattr(wrong, 'shape', '')} cannot stand for {marker}; give a path, a PIL picture or a "
            "uint8 array (for a video: a path, a list of pictures or an array of frames)"
        )
    return shared


def is_empty(media: Any) -> bool:
    """Whether ``media`` holds no medium for any text."""
    return media is None or (
        isinstance(media, list | tuple) and all(isinstance(o, list | tuple) and not o for o in media)
    )


def is_image(value: Any) -> bool:
    """Whether ``value`` has the form of one image."""
    return isinstance(value, str | os.PathLike | Image.Image) or getattr(value, "ndim", 0) == 3


def is_video(value: Any) -> bool:
    """Whether ``value`` has the form of one video."""
    if isinstance(value, Frames):
        return bool(value) and all(is_image(one) for one in value)
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, Image.Image) or getattr(one, "ndim", 0) == 3 for one in value)
    return isinstance(value, str | os.PathLike) or getattr(value, "ndim", 0) == 4


def read_frames(video: Any, num_frames: int, fps: float, rule: str, sampled: bool | None = None) -> list[Image.Image]:
    """The frames of a video as RGB pictures: of a file those that ``sample_frame_indices`` chooses, of given frames all.

    Raises ``MediaError`` for a file that cannot be read, ``ValueError`` for a frame that is not a picture, and if ``sampled``
    asks for the other of both.
    """
    if sampled is not None and sampled is not isinstance(video, str | os.PathLike):
        raise ValueError(
            f"do_sample_frames={sampled}, but frames of a file are sampled and given frames are all taken; leave it out"
        )
    if isinstance(video, str | os.PathLike):
        info = probe_video(_path(video))
        return decode_video_frames(info.source, sample_frame_indices(info, num_frames, fps, rule), info)
    return [read_picture(frame) for frame in video]


def read_picture(image: Any) -> Image.Image:
    """An image as an RGB picture. Raises ``MediaError`` for a file that cannot be read, ``ValueError`` for an unfit array."""
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if isinstance(image, str) and image.startswith("data:"):
        return _inline(image)
    if isinstance(image, str | os.PathLike):
        return load_image(_path(image))
    array = np.asarray(image)
    if array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.shape[-1] != 3:
        raise ValueError(
            f"a picture is given as an array of {array.dtype} {list(array.shape)}; give uint8 values as [H, W, 3] or [3, H, W]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _path(path: str | os.PathLike) -> str:
    """``path`` as text, that of a ``file://`` address too. Raises ``ValueError`` for another address."""
    name = os.fspath(path)
    address = urlsplit(name) if name.startswith("file://") else None
    if address is not None and address.netloc in ("", "localhost"):
        return unquote(address.path)
    if name.startswith("data:"):
        raise ValueError("a video is given as data:; write it to a file and give its path, or give its frames")
    if "://" in name:
        raise ValueError(f"{name} is a network address; download the file and give its path")
    return str(Path(name))


def _inline(address: str) -> Image.Image:
    """The picture in a ``data:`` address, as RGB. Raises ``ValueError`` for one that holds none."""
    try:
        content = base64.b64decode(address.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(content)) as picture:
            return as_rgb(picture)
    except (binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{address[:40]}... holds no picture in base64 ({error}); give data:image/png;base64,...") from error

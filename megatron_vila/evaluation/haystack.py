"""What a needle test is made of: a long video (the haystack), and pictures with a question and a short answer each (the needles).

Everything here is metadata and looks alike to every rank: no pixel is decoded.

Legend: N frames of a haystack.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vila.data.clips import picture_files
from megatron_vila.data.images import picture_size
from megatron_vila.data.placement import MARKER
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video_index import probe_video
from megatron_vila.errors import UserError
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import FrameRef

_BLOCK = 2**20
_FIELDS = ("image", "question", "answer")


class HaystackError(UserError):
    """A haystack or its needles cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Needle:
    """``picture`` is the path of an image; the ``answer`` to the ``question`` can be seen in it and nowhere else."""

    picture: str
    question: str
    answer: str


@dataclass(frozen=True)
class Haystack:
    """The frames of a long video in their order: ``indices`` (int64 [N]) of the file ``source``, or of ``pictures``, which are
    the files of all its frames if ``source`` is a folder."""

    source: str
    indices: np.ndarray
    pictures: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def frame(self, number: int, unit: Unit) -> FrameRef:
        """Frame ``number`` as one unit of a document. Raises ``ValueError`` for a unit of several frames."""
        index = int(self.indices[number])
        return FrameRef(self.source, (index,), True, unit, (self.pictures[index],) if self.pictures else ())


def needle_frame(needle: Needle, unit: Unit) -> FrameRef:
    """The needle's picture as a frame of a video. Raises ``ValueError`` for a unit of several frames."""
    return FrameRef(needle.picture, (0,), True, unit, (needle.picture,))


def open_haystack(source: str | Path, fps: float, wanted: int) -> Haystack:
    """The first ``wanted`` frames of a video file at ``fps`` frames per second, or the first pictures of a folder.

    Raises ``MediaError`` for what cannot be read, ``HaystackError`` where it has fewer frames.
    """
    if not fps > 0:
        raise HaystackError(f"--fps {fps:g}: a haystack is read at a positive number of frames per second")
    path = str(source)
    if os.path.isdir(path):
        pictures = picture_files(path)
        count, cure = len(pictures), "put more pictures into the folder, or take fewer --frames"
        indices = np.arange(min(wanted, count), dtype=np.int64)
    else:
        pictures, info = (), probe_video(path)
        indices = sample_frame_indices(info, wanted, fps, "first")
        count = len(indices)
        cure = f"it lasts {info.duration_s:.0f} s: take a longer video, a higher --fps or fewer --frames"
    if count < wanted:
        rate = "" if pictures else f" at --fps {fps:g}"
        raise HaystackError(
            f"the haystack {path} has {count} frames{rate}, and the longest of --frames needs {wanted} beside the needle; {cure}"
        )
    return Haystack(path, indices, pictures)


def read_needles(path: str | Path) -> tuple[Needle, ...]:
    """Needles of a JSON file: a list of objects with ``image`` (a path, relative to the file), ``question`` and ``answer``.

    Raises ``HaystackError`` for a file that is not such a list, ``MediaError`` for a picture that cannot be read.
    """
    file = Path(path)
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HaystackError(f"the needles {file} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(records, list) or not records:
        raise HaystackError(f"the needles {file} are not a JSON list of at least one object with {', '.join(_FIELDS)}")
    needles = tuple(_needle(record, f"needle {number} of {file}", file.parent) for number, record in enumerate(records))
    for needle in needles:
        picture_size(needle.picture)
    return needles


def _needle(record: Any, name: str, folder: Path) -> Needle:
    if not isinstance(record, Mapping):
        raise HaystackError(f"{name} is not an object with {', '.join(_FIELDS)}")
    for field in _FIELDS:
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise HaystackError(f"{name}: {field!r} must be a text that is not empty, it is {record.get(field)!r}")
    if MARKER.search(record["question"]):
        raise HaystackError(
            f"{name}: the question holds a media marker; write the words alone, the video is put before them"
        )
    return Needle(str(folder / record["image"]), record["question"].strip(), record["answer"].strip())


def digest_of_haystack(haystack: Haystack) -> str:
    """Another text for another video: names and sizes of pictures; size and three blocks of a file, whose whole content may be
    hundreds of gigabytes."""
    state = hashlib.sha256()
    for picture in haystack.pictures:
        state.update(f"{os.path.basename(picture)} {os.path.getsize(picture)}\n".encode())
    if not haystack.pictures:
        size = os.path.getsize(haystack.source)
        state.update(str(size).encode())
        with open(haystack.source, "rb") as file:
            for place in (0, size // 2, max(0, size - _BLOCK)):
                file.seek(place)
                state.update(file.read(_BLOCK))
    return state.hexdigest()[:16]


def digest_of_needles(needles: Sequence[Needle]) -> str:
    """Another text for other pictures, questions or answers."""
    state = hashlib.sha256()
    for needle in needles:
        state.update(hashlib.sha256(Path(needle.picture).read_bytes()).digest())
        state.update(json.dumps([needle.question, needle.answer]).encode())
    return state.hexdigest()[:16]

"""One medium, prepared once, in a folder of its own that appears whole or not at all.

A folder ``media/<name>`` in the working folder of a preparation holds the files that a medium becomes and ``medium.json``, which
says what they are and of what state of the source. A process that was killed leaves a folder under another name, which is made
anew; a folder that is there and whole is taken as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_vila.data.clips import picture_files
from megatron_vila.data.fields import Media
from megatron_vila.data.media import MediaSource, Member, errors_of, open_media, state_of
from megatron_vila.data.prepare.frames import KeptFrames, keep_frames
from megatron_vila.data.prepare.options import Options, Outcome
from megatron_vila.data.prepare.pictures import prepare_frame, prepare_picture
from megatron_vila.data.prepare.transcode import transcode

INFO = "medium.json"


def name_of_medium(medium: Media) -> str:
    """A name that media have in common if they are the same clip of the same file."""
    parts = [
        medium.is_video,
        medium.start_s,
        medium.end_s,
        medium.fps,
        *map(_identity, (medium.path, *medium.pictures)),
    ]
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _identity(source: MediaSource) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return repr(source) if isinstance(source, Member) else os.path.abspath(source)


def prepare_medium(medium: Media, options: Options, folder: str) -> Outcome:
    """What the files of ``medium`` under ``folder`` are: those that are there, else they are made.

    Raises ``MediaError`` for a medium that cannot be used, ``OSError`` where the disk does not take it.
    """
    place = Path(folder) / name_of_medium(medium)
    with errors_of(medium.path, "cannot be read"):
        state = _state(medium)
    known = _read(place, state)
    if known is not None:
        return known
    shutil.rmtree(place, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".part", dir=folder))
    try:
        outcome = _prepare(medium, options, making, sum(int(size) for size, *_ in state))
        (making / INFO).write_text(json.dumps({"state": state, "outcome": dataclasses.asdict(outcome)}))
        os.rename(making, place)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return _at(place, outcome)


def _state(medium: Media) -> list[Any]:
    sources = medium.pictures or (medium.path,)
    if medium.is_video and not medium.pictures and isinstance(medium.path, str) and os.path.isdir(medium.path):
        sources = picture_files(medium.path)
    return [list(map(str, state_of(source))) for source in sources]


def _read(place: Path, state: list[Any]) -> Outcome | None:
    """What is there of a source in ``state``; None if that is nothing, or not whole: a machine that lost its power leaves names
    without content."""
    try:
        content = json.loads((place / INFO).read_text())
        files = tuple(map(tuple, content["outcome"].pop("files")))
        outcome = _at(place, Outcome(files=files, **content["outcome"]))
        is_whole = sum(os.path.getsize(name) for _, name in outcome.files) == outcome.written
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return outcome if is_whole and content["state"] == state else None


def _at(place: Path, outcome: Outcome) -> Outcome:
    files = tuple((ending, str(place / Path(name).name)) for ending, name in outcome.files)
    return dataclasses.replace(outcome, files=files)


def _prepare(medium: Media, options: Options, folder: Path, read: int) -> Outcome:
    if not medium.is_video:
        picture = prepare_picture(medium.path, options.picture_side, options.picture_quality)
        name = f"0.{picture.ending}"
        (folder / name).write_bytes(picture.content)
        return Outcome(
            kind="image",
            files=((picture.ending, name),),
            frames=1,
            seconds=0.0,
            read=read,
            written=len(picture.content),
            width=picture.width,
            height=picture.height,
        )
    kept = keep_frames(medium, options.fps)
    if not len(kept.pts):
        return _pictures(kept, options, folder, read)
    file = folder / "0.mp4"
    encoded = transcode(kept, options, file)
    outcome = Outcome(
        kind="video",
        files=(("mp4", file.name),),
        frames=len(kept.indices),
        seconds=float(kept.seconds[-1]),
        read=read,
        written=file.stat().st_size,
        width=encoded.width,
        height=encoded.height,
        psnr=round(encoded.psnr, 2),
        poor=encoded.psnr < options.min_psnr,
    )
    if outcome.poor and options.poor == "original" and not kept.pictures:
        return _original(medium, outcome, folder)
    return outcome


def _original(medium: Media, outcome: Outcome, folder: Path) -> Outcome:
    """The file of a video as it is, in place of one that was not rendered well enough."""
    (folder / outcome.files[0][1]).unlink()
    source = medium.path
    name = source.name if isinstance(source, Member) else "" if isinstance(source, bytes) else str(source)
    ending = os.path.splitext(name)[1].lstrip(".").lower() or "mp4"
    with open_media(source) as file, open(folder / f"0.{ending}", "wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)
    written = (folder / f"0.{ending}").stat().st_size
    return dataclasses.replace(outcome, kind="original", files=((ending, f"0.{ending}"),), written=written)


def _pictures(kept: KeptFrames, options: Options, folder: Path, read: int) -> Outcome:
    """The pictures of a video whose rate nobody knows: they stay pictures, all of them."""
    frames = []
    for place, index in enumerate(kept.indices):
        frame = prepare_frame(kept.pictures[index], options.short_side, options.picture_quality)
        (folder / f"{place:06d}.jpg").write_bytes(frame.content)
        frames.append(frame._replace(content=b""))
    files = tuple(("jpg", f"{place:06d}.jpg") for place in range(len(frames)))
    return Outcome(
        kind="pictures",
        files=files,
        frames=len(frames),
        seconds=0.0,
        read=read,
        written=sum((folder / name).stat().st_size for _, name in files),
        width=frames[0].width,
        height=frames[0].height,
    )

"""The files of a snapshot beside its keys and values: info.json, and the document that was read.

    NAME/info.json       what the snapshot is of and for, with the size and checksums of the other files and a checksum of itself
    NAME/document        token ids and frames (``data/kept_arrays.py``)
    NAME/rank-00000.kv   positions, then keys and values layer by layer, of one rank (``raw_tensors.py``)

A snapshot appears under its name only when it is whole: it is written as ``.NAME.partial``. Nothing in it is a pickled object.

Legend: L tokens of the document, F units of frames.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_vila.checkpoint.files import check_files, sum_of, write_bytes
from megatron_vila.checkpoint.folder import INFO
from megatron_vila.checkpoint.io import flush, open_plain
from megatron_vila.data.kept_arrays import read_arrays, write_arrays
from megatron_vila.data.media import MediaError, MediaSource, name_of, state_of
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.plain_files import has_kind
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, Document, FrameRef

FORMAT = 1
KIND = "megatron_vila snapshot"
DOCUMENT = "document"
_HEAD = {"kind": KIND, "format": FORMAT}
_UNIT_FIELDS = len(fields(Unit))
_ARRAYS = {
    "token_ids": ("int64", 1),
    "frame_starts": ("int64", 1),
    "frame_media": ("int64", 1),
    "frame_units": ("int64", 2),
    "indices": ("int64", 1),
}


def rank_file(rank: int) -> str:
    return f"rank-{rank:05}.kv"


@dataclass(frozen=True)
class RankFile:
    """What a rank wrote: its tokens, the key/value heads of each, the bytes of its file and the checksums of their blocks."""

    tokens: int
    kv_heads: int
    size: int
    sums: tuple[str, ...]


@dataclass(frozen=True)
class Medium:
    """A file that a snapshot's frames are of: its ``state`` (``media.state_of``: size and time of change) when the snapshot was
    saved, and the hash of its content. ``pictures`` are the files of the frames, in their order, if each has its own."""

    path: str
    is_video: bool
    pictures: tuple[str, ...]
    state: tuple[int | str, ...]
    content: str


@dataclass(frozen=True)
class SnapshotInfo:
    """What info.json says. ``layout`` has tp, ulysses and ring; ``cache`` is a name as ``--cache`` takes it."""

    model: str
    key: str
    tokens: int
    layout: dict[str, int]
    cache: str
    layers: int
    head_dim: int
    media: tuple[Medium, ...]
    ranks: tuple[RankFile, ...]
    document_bytes: int
    document_sum: str
    saved: str

    @property
    def files(self) -> dict[str, int]:
        """The size of each file beside info.json, in bytes."""
        return {DOCUMENT: self.document_bytes} | {rank_file(r): told.size for r, told in enumerate(self.ranks)}


@contextlib.contextmanager
def writing(folder: Path, size: int) -> Iterator[Path]:
    """The hidden folder in which the snapshot ``folder`` with ``size`` bytes of keys and values is written, this process's alone;
    ``finish`` makes it the snapshot, and after an error it is deleted.

    What an interrupted save has left there is deleted before. Raises ``CheckpointError`` if another process saves there now,
    something else than a snapshot stands at ``folder`` or its disk has no room, ``OSError`` if the system refuses.
    """
    if not folder.name:
        raise CheckpointError(f"{folder} is no name for a snapshot")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(folder) and not _may_be_replaced(folder):
        raise CheckpointError("something else than a snapshot stands there; name another folder")
    partial = _hidden(folder, "partial")
    with contextlib.suppress(FileNotFoundError), _alone(partial):
        shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < size:
        raise CheckpointError(
            f"it takes {size / GIB:.1f} GiB and the disk of {folder.parent} has {free / GIB:.1f} GiB free; make room, or name a "
            "folder on another disk"
        )
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise _taken(partial) from error
    with _alone(partial):
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold the folder ``partial``; the system lets go of it when this process ends. Raises ``CheckpointError`` if another process
    holds it, ``FileNotFoundError`` if it is not there."""
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(partial) from error
        yield
    finally:
        os.close(descriptor)


def _taken(partial: Path) -> CheckpointError:
    return CheckpointError(f"another process saves there now (it writes {partial}); name another folder, or wait for it")


def finish(folder: Path, partial: Path, document: Document, info: SnapshotInfo) -> None:
    """Write what ``partial`` still lacks, and let it appear as ``folder``; a snapshot that stands there goes.

    ``info`` is without ``document_bytes`` and ``document_sum``, which are found here. Raises ``CheckpointError`` if a rank's file
    is not there, ``OSError`` if the system refuses.
    """
    data = _document_bytes(document)
    write_bytes(partial / DOCUMENT, data)
    info = replace(info, document_bytes=len(data), document_sum=xxhash.xxh3_64_hexdigest(data))
    content = _HEAD | asdict(info)
    write_bytes(partial / INFO, json.dumps(content | {"sum": sum_of(content)}).encode() + b"\n")
    try:
        check_files(partial, {"files": info.files})
    except DamagedError as error:
        raise CheckpointError(f"{error}; all nodes must share the folder") from error
    flush(partial)
    replaced = _hidden(folder, "replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_snapshot_info(folder: str | Path) -> SnapshotInfo:
    """What the snapshot ``folder`` is of. Raises ``DamagedError`` if its files are not what was written (their content is checked
    when it is read), ``CheckpointError`` if there is none or this version cannot read it."""
    folder = Path(folder)
    if not os.path.lexists(folder / INFO):
        replaced, partial = _hidden(folder, "replaced"), _hidden(folder, "partial")
        if not folder.exists() and (replaced / INFO).is_file():
            raise CheckpointError(
                f"it was being replaced when that was interrupted; the earlier one is {replaced}: rename it"
            )
        unfinished = f" ({partial.name} beside it was not finished: save it again)" if partial.exists() else ""
        raise CheckpointError(f"there is no snapshot{unfinished}")
    with open_plain(folder / INFO) as file:
        text = file.read()
    try:
        content = json.loads(text)
        if content["kind"] == KIND and content["format"] > FORMAT:
            raise CheckpointError(
                f"it has format {content['format']}, this version reads up to {FORMAT}; update megatron_vila"
            )
        if content.pop("sum") != sum_of(content) or {name: content.pop(name) for name in _HEAD} != _HEAD:
            raise ValueError("it is not what was written")
        media = tuple(_medium(told) for told in content.pop("media"))
        ranks = tuple(RankFile(**told) for told in content.pop("ranks"))
        info = SnapshotInfo(media=media, ranks=ranks, **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{INFO} is damaged: {error}") from error
    check_files(folder, {"files": info.files})
    return info


def media_of(document: Document, content_of: Callable[[MediaSource], str]) -> tuple[Medium, ...]:
    """The media of a document's frames, each once. ``content_of`` hashes the content of a file.

    Raises ``CheckpointError`` for one that is no file, ``MediaError`` and ``OSError`` for one that cannot be read.
    """
    pictures: dict[tuple[Any, bool], list[Any]] = {}
    for frame in document.frames:
        pictures.setdefault((frame.source, frame.is_video), []).extend(frame.pictures)
    return tuple(_identity(source, is_video, names, content_of) for (source, is_video), names in pictures.items())


def _identity(source: Any, is_video: bool, pictures: Sequence[Any], content_of: Callable[[MediaSource], str]) -> Medium:
    elsewhere = [x for x in (source, *pictures) if not isinstance(x, (str, os.PathLike))]
    if elsewhere:
        raise CheckpointError(
            f"{name_of(elsewhere[0])} is no file of its own; a snapshot names the files that were read"
        )
    path = os.path.abspath(source)
    if pictures:  # the source only names them together
        content = xxhash.xxh3_128_hexdigest("".join(map(content_of, pictures)).encode())
        return Medium(path, is_video, tuple(map(os.path.abspath, pictures)), (), content)
    return Medium(path, is_video, (), state_of(source), content_of(source))


def _medium(told: Mapping[str, Any]) -> Medium:
    return Medium(**{**told, "pictures": tuple(told["pictures"]), "state": tuple(told["state"])})


def changed(media: Sequence[Medium], content_of: Callable[[MediaSource], str]) -> list[str]:
    """Paths of ``media`` that hold something else than when they were read. Files that are gone are left out, and only those
    whose size or time of change differs are read."""
    found = []
    for medium in media:
        with contextlib.suppress(OSError, MediaError):
            if (
                not medium.pictures
                and state_of(medium.path) != medium.state
                and content_of(medium.path) != medium.content
            ):
                found.append(medium.path)
    return found


def _document_bytes(document: Document) -> bytes:
    """``document`` without its labels: nothing is supervised here."""
    media: dict[Any, int] = {}
    arrays = {
        "token_ids": document.token_ids.astype(np.int64),
        "frame_starts": document.frame_starts.astype(np.int64),
        "frame_media": np.array(
            [media.setdefault((f.source, f.is_video), len(media)) for f in document.frames], np.int64
        ),
        "frame_units": np.array([astuple(f.unit) for f in document.frames], np.int64).reshape(-1, _UNIT_FIELDS),
        "indices": np.array([index for f in document.frames for index in f.indices], np.int64),
    }
    stream = io.BytesIO()
    write_arrays(stream, arrays, {"sample_id": document.sample_id, "media": list(document.media)})
    return stream.getvalue()


def read_document(folder: Path, info: SnapshotInfo) -> Document:
    """The document of a snapshot, its labels all ``IGNORE``. Raises ``DamagedError``."""
    if _file_sum(folder / DOCUMENT) != info.document_sum:
        raise DamagedError(f"{DOCUMENT} is damaged: it is not what was written")
    found = read_arrays(folder / DOCUMENT, _ARRAYS)
    try:
        if found is None:
            raise ValueError("it holds other arrays")
        arrays, note = {name: np.array(x) for name, x in found[0].items()}, found[1]
        return Document(
            token_ids=arrays["token_ids"],
            labels=np.full(len(arrays["token_ids"]), IGNORE, np.int64),
            frames=tuple(_frames(arrays, info.media)),
            frame_starts=arrays["frame_starts"],
            sample_id=str(note["sample_id"]),
            media=tuple(map(int, note["media"])),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedError(f"{DOCUMENT} is damaged: {error}") from error


def _frames(arrays: Mapping[str, np.ndarray], media: Sequence[Medium]) -> Iterator[FrameRef]:
    indices, pictures = iter(arrays["indices"].tolist()), [iter(medium.pictures) for medium in media]
    for number, numbers in zip(arrays["frame_media"].tolist(), arrays["frame_units"].tolist(), strict=True):
        unit, medium = Unit(*numbers), media[number]
        taken = tuple(itertools.islice(indices, unit.frames))
        files = tuple(itertools.islice(pictures[number], unit.frames))
        yield FrameRef(medium.path, taken, medium.is_video, unit, files)


def _may_be_replaced(folder: Path) -> bool:
    """Whether ``folder`` is a snapshot, damaged or not, or an empty folder."""
    if not has_kind(folder, stat.S_ISDIR):
        return False
    names = {entry.name for entry in os.scandir(folder)}
    return not names or {INFO, DOCUMENT, rank_file(0)} <= names


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _file_sum(path: Path) -> str:
    with open_plain(path) as file:
        return xxhash.xxh3_64_hexdigest(file.read())

"""Pieces of remote files that are kept on a node: each is fetched once, and together they never take more than their room.

All processes of a node that name the same folder share it. A piece is a file that is written in one step; while one process
fetches it, the others wait. A reader holds a shared lock on the file, so what is in use is not removed; of the rest, what was
used least recently goes first. A piece that finds no room is given to the one who asked and is not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_vila.data.kept import kept

WAIT_S = 600.0
"""Seconds that a process waits for another one to fetch a piece, before it fetches it itself."""

TOUCHED_S = 30.0
"""A piece that was used again is marked as used now, at most so often."""

KEPT_SHARE = 0.9
"""What is left of the room when pieces have been removed to make some."""

ABANDONED_S = 3600.0
"""Age from which a file that was never finished belongs to a process that is gone."""

logger = logging.getLogger(__name__)


class PieceCache:
    """Pieces in ``folder``, of at most ``room`` bytes together. Safe for threads and for processes."""

    def __init__(self, folder: Path, room: int) -> None:
        self._folder, self._room = folder, room
        self._told = False

    def read(self, group: str, first: int, end: int, offset: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """``size`` bytes from ``offset`` of the file known as ``group``, which lie between ``first`` and ``end``.

        The piece from ``first`` to ``end`` is taken from the folder, else ``fetch()``, which gives all of it. Raises what
        ``fetch`` raises.
        """
        folder = self._folder / hashlib.sha256(group.encode()).hexdigest()[:32]
        with kept(
            folder,
            f"{first}-{end}.piece",
            lambda file: _opened(file, end - first),
            lambda: io.BytesIO(fetch()),
            self._write,
            WAIT_S,
        ) as piece:
            piece.seek(offset - first)
            return piece.read(size)

    def _write(self, stream: BinaryIO, piece: BinaryIO) -> None:
        """Write ``piece`` where there is room for it. Raises ``OSError`` where there is none."""
        content = piece.read()
        piece.seek(0)
        if not self._reserve(len(content)):
            if not self._told:
                self._told = True
                logger.warning(
                    "%s is full of pieces that are in use: more is fetched and not kept; raise data.cache_gib",
                    self._folder,
                )
            raise OSError("no room")
        try:
            stream.write(content)
            stream.flush()
        except BaseException:
            self._reserve(-len(content))
            raise

    def _reserve(self, size: int) -> bool:
        """Count ``size`` bytes more as used, if there is room for them or can be made."""
        with self._count() as count:
            used = int(count.read(20) or b"0")
            if size > 0 and used + size > self._room:
                used = self._make_room(int(self._room * KEPT_SHARE) - size)
            if used + size > self._room:
                return False
            count.seek(0)
            count.truncate()
            count.write(b"%d" % max(0, used + size))
            return True

    @contextlib.contextmanager
    def _count(self) -> Iterator[BinaryIO]:
        """The file with the number of bytes in use, which no other process reads or writes meanwhile."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._folder / "bytes", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+b") as count:
            fcntl.flock(count, fcntl.LOCK_EX)
            yield count

    def _make_room(self, most: int) -> int:
        """Remove pieces that nobody reads, the least recently used first, down to ``most`` bytes. The bytes that are left."""
        found, used, now = [], 0, time.time()
        for folder in self._folder.iterdir():
            for file in folder.iterdir() if folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    status = file.stat()
                    if file.suffix == ".piece" or (file.suffix == ".part" and now - status.st_mtime > ABANDONED_S):
                        found.append((status.st_mtime, status.st_size, file))
                    used += status.st_size
        for _, size, file in sorted(found):
            if used <= most:
                break
            if _removed(file):
                used -= size
        return used


def _opened(file: Path, size: int) -> BinaryIO | None:
    """The piece ``file``, which is not removed while it is open; None if it is not there or not of ``size`` bytes."""
    try:
        stream = file.open("rb", buffering=0)
    except OSError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_SH)
        status = os.fstat(stream.fileno())
        if status.st_size == size:
            if time.time() - status.st_mtime > TOUCHED_S:
                with contextlib.suppress(OSError):
                    os.utime(file)
            return stream
    except OSError:
        pass
    stream.close()
    return None


def _removed(file: Path) -> bool:
    """Whether ``file`` could be removed: nobody reads it."""
    try:
        with file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        return True
    except OSError:
        return False

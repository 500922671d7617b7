"""Files that only report on a run. Writing them never ends the run and never hides another error.

There are two kinds of files:

* must not be lost: ``checkpoints/``. A checkpoint that cannot be written ends the run with one message on every rank;
* only reports: ``metrics.jsonl``, ``tensorboard/``, ``loss.png``, ``summary.json``, ``memory.json``, ``config.yaml``,
  ``traces/`` and the lines on the screen. If one cannot be written, one line says so, and it is tried again.
"""

from __future__ import annotations

import logging
import os
import stat
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

WAITING_BYTES = 64 * 2**20
"""most bytes of records that wait in memory while a disk is full; the oldest are dropped first"""


class Reporting:
    """Runs actions that write a report. A failure is logged in one line, and not again before that report has worked."""

    def __init__(self) -> None:
        self._failing: set[str] = set()

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of ``action``, None where it failed. ``what`` names the file in the line."""
        try:
            result = action()
        except Exception as error:
            if what not in self._failing:
                self._failing.add(what)
                # logging ignores errors of its own stream, so this line cannot fail
                logger.error("%s cannot be written (%s); the run continues without it", what, reason_of(error))
            return None
        if what in self._failing:
            self._failing.discard(what)
            logger.error("%s is written again", what)
        return result


def reason_of(error: Exception) -> str:
    """The system's words for an ``OSError``; for a fault of the program its type, text and place."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    place = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f", {Path(p.filename).name} line {p.lineno}" for p in place)


class AppendFile:
    """A file that grows record by record, of which no reader sees half a record after a failure.

    A record that cannot be written is kept (up to ``WAITING_BYTES``) and written before the next one. A file or folder that was
    removed meanwhile is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0

    def write(self, record: bytes) -> None:
        """Append the records that wait, and ``record``. Raises ``OSError``, after which the file holds only whole records."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        while self._waiting_bytes > WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
        self._write_waiting()

    def close(self) -> None:
        """Try once more to write the records that wait, and close the file; it is closed even if that raises ``OSError``."""
        try:
            if self._waiting:
                self._write_waiting()
        finally:
            self._close()

    def _write_waiting(self) -> None:
        descriptor = self._opened()
        size, rest = os.fstat(descriptor).st_size, memoryview(b"".join(self._waiting))
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
        self._waiting.clear()
        self._waiting_bytes = 0

    def _opened(self) -> int:
        """The descriptor of the file that is at the path now."""
        if self._descriptor is not None and not self._is_in_place(self._descriptor):
            self._close()
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # O_NONBLOCK: a pipe of that name is refused instead of waited for
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o644)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(0, "it is not a regular file", str(self._path))
            self._descriptor = descriptor
        return self._descriptor

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(descriptor))
        except OSError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

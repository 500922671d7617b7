"""What is found out about files once and kept for later runs and for the other ranks: one place, one way.

Kept files lie in ``~/.cache/megatron_vila`` (``XDG_CACHE_HOME`` is respected). They hold plain data, and each is written
beside its place and moved there, so a reader never sees half of one. While one process makes a file, the others wait for it.
A folder that cannot be written switches this off: each process then makes its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")


def kept_folder(kind: str) -> Path | None:
    """Where files of ``kind`` are kept; None if there is no home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_vila" / kind
    except RuntimeError:
        return None


def kept(
    folder: Path | None,
    name: str,
    read: Callable[[Path], T | None],
    make: Callable[[], T],
    write: Callable[[BinaryIO, T], None],
    wait_s: float,
) -> T:
    """What ``read`` finds in the file ``name`` of ``folder``, else ``make()``, which ``write`` keeps there.

    ``read`` gives None for a file that is missing, damaged or of something else. ``wait_s`` is how long to wait for another
    process that makes it, in seconds; after that this one makes it too. Raises what ``make`` raises.
    """
    try:
        if folder is None:
            return make()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return make()
    file = folder / name
    known = read(file)
    if known is not None:
        return known
    with _alone(file.with_suffix(".lock"), wait_s):
        known = read(file)
        if known is None:
            known = make()
            _put(file, lambda stream: write(stream, known))
    return known


def _put(file: Path, write: Callable[[Any], None]) -> None:
    """Write ``file`` in one step, if the folder and the disk take it."""
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
        try:
            write(stream)
            # A small file is written only now, and a full disk is noticed only then.
            stream.flush()
            os.replace(stream.name, file)
        except BaseException:
            os.unlink(stream.name)
            raise


@contextlib.contextmanager
def _alone(lock: Path, wait_s: float) -> Iterator[None]:
    """Hold ``lock``, which ends with the process that holds it, or go on without it where locks do not work."""
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        end_s = time.monotonic() + wait_s
        while time.monotonic() < end_s:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)

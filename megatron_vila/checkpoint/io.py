"""What saving and loading share: the errors, plain files and plain values."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_vila.errors import UserError

SHOWN = 8
_NOT_PLAIN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""how opening fails where a file is missing, or a link or a socket stands in its place"""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved or loaded; the text says why, what is intact and what to do. Raised on every rank."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written: the one reason for which a checkpoint is passed over and renamed."""


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file to read, without waiting for the writer of a pipe.

    Raises ``DamagedError`` if it is missing, a link, a folder, a device or a pipe, ``CheckpointError`` if the system refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        kind = DamagedError if error.errno in _NOT_PLAIN else CheckpointError
        raise kind(f"{path.name} cannot be opened as a plain file: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError(f"{path.name} is no plain file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def require_plain(value: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is made of dicts, lists, tuples, strings, numbers, None and tensors only."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(key, f"a key of {name}")
            require_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_plain(item, f"{name}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None), torch.Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a checkpoint holds plain dicts, lists, strings, numbers and tensors"
        )


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def require_no_refusal(error: BaseException, name: str) -> None:
    """Raise ``CheckpointError`` if reading file ``name`` failed with ``error`` because the operating system refused something."""
    refusal = refusal_behind(error)
    if refusal is not None:
        raise CheckpointError(f"{name} cannot be read: {type(refusal).__name__}: {refusal}") from error


def refusal_behind(error: BaseException) -> BaseException | None:
    """What the operating system refused, if that is behind ``error``: it says nothing about the content of a file."""
    reason: BaseException | None = error
    while reason is not None and not _is_refusal(reason):
        reason = reason.__cause__ or reason.__context__
    return reason


def _is_refusal(error: BaseException) -> bool:
    # What Python's own files cannot do, and a place to read at that no file has: the content asked for it.
    if isinstance(error, io.UnsupportedOperation) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return False
    # torch has no class of its own for host memory.
    return isinstance(error, (OSError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))

"""What saving and loading share: the errors, plain files and plain values."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_vila.errors import CheckpointError, DamagedError, refusal_behind

_NOT_PLAIN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""how opening fails where a file is missing, or a link or a socket stands in its place"""


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
        raise DamagedError(f"{path.name} is not a plain file")
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


def require_no_refusal(error: BaseException, name: str) -> None:
    """Raise ``CheckpointError`` if reading file ``name`` failed with ``error`` because the operating system refused something."""
    refusal = refusal_behind(error)
    if refusal is not None:
        raise CheckpointError(f"{name} cannot be read: {type(refusal).__name__}: {refusal}") from error

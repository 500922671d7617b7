"""A folder with shards: what is asked of one, wherever it lies; and the one on this machine."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Protocol

from megatron_vila.data.fields import RecordError
from megatron_vila.data.media import Storage
from megatron_vila.data.sources.source import ChangedFileError, lost
from megatron_vila.data.sources.tar import Read

LARGEST_SMALL_FILE = 2**26
"""Bytes of the largest file that is read as a whole."""


class Folder(Protocol):
    """Files under ``path``, a path or an address, which is ``identity`` however it was named. Every failure names the file."""

    path: str
    identity: str

    def place(self, name: str) -> str:
        """The whole name of a file, for messages and for ``Member``."""

    def content(self, name: str) -> bytes | None:
        """A small file; None if it is not there. Raises ``RecordError``."""

    def state(self, name: str) -> tuple[int, str]:
        """The bytes of a file, and a text that changes when the file does. Raises ``RecordError``."""

    def states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        """``state`` of many files."""

    def quick_states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        """``states``, or nothing where they are not to be had at once."""

    def as_file(self, name: str) -> AbstractContextManager[str]:
        """The path of a file on this machine with the content of the file ``name``. Raises ``RecordError``."""

    def opened(self, name: str, size: int, start: int, end: int) -> AbstractContextManager[tuple[Read, Storage | None]]:
        """What reads the bytes from ``start`` to ``end`` of the shard ``name``, and what ``Member`` needs to do so later.

        Raises ``ChangedFileError`` if it is gone, cannot be read or has not ``size`` bytes.
        """


class NoFileError(RecordError):
    """There is no such file."""


def small_file(path: str, most: int = LARGEST_SMALL_FILE) -> bytes:
    """The content of a file of at most ``most`` bytes. Raises ``NoFileError``, ``RecordError``."""
    try:
        if os.path.getsize(path) > most:
            raise RecordError(f"{path}: more than {most:,} bytes")
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        kind = NoFileError if isinstance(error, FileNotFoundError) else RecordError
        raise kind(f"{path}: cannot be read: {error.strerror}") from error


class LocalFolder:
    """A folder of this machine's file system: a ``Folder``."""

    def __init__(self, path: str) -> None:
        self.path, self.identity = path, os.path.realpath(path)

    def place(self, name: str) -> str:
        return os.path.join(self.path, name)

    def content(self, name: str) -> bytes | None:
        try:
            return small_file(self.place(name))
        except NoFileError:
            return None

    def state(self, name: str) -> tuple[int, str]:
        try:
            status = os.stat(self.place(name))
        except OSError as error:
            raise RecordError(
                f"{self.place(name)}: cannot be read: {error.strerror}; put it back, or prepare the folder again"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(
                f"{self.place(name)}: not a regular file; put the shard back, or prepare the folder again"
            )
        return status.st_size, str(status.st_mtime_ns)

    def states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        return [self.state(name) for name in names]

    def quick_states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        return self.states(names)

    @contextlib.contextmanager
    def as_file(self, name: str) -> Iterator[str]:
        yield self.place(name)

    @contextlib.contextmanager
    def opened(self, name: str, size: int, start: int, end: int) -> Iterator[tuple[Read, Storage | None]]:
        path = self.place(name)
        with _opened(path) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length != size:
                raise ChangedFileError(changed(path, length, size))
            descriptor = stream.fileno()
            yield (lambda offset, count: os.pread(descriptor, count, offset)), None


def _opened(path: str) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise lost(f"{path}: the shard", error) from error


def changed(path: str, found: int, before: int) -> str:
    """What is said of a shard of another size than it had."""
    return (
        f"{path}: the shard has {found:,} bytes and had {before:,} when it was opened; shards must stay as they are while a run "
        "reads them. Put the old one back and start again"
    )

"""Shards behind an address (``s3://``, ``gs://``, ``https://`` ...), read by fsspec in pieces that are kept on the node.

A sample is fetched in pieces of at most ``PIECE`` bytes, counted from its first byte: most samples are one piece, and of a long
video only what is looked at travels. What fails for a moment is tried again a few times. What is gone, has changed or cannot be
reached for longer ends the run, because no other sample would fare better.
"""

from __future__ import annotations

import contextlib
import importlib.util
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.kept import kept_folder
from megatron_vila.data.media import Storage
from megatron_vila.data.sources.folder import LARGEST_SMALL_FILE, changed
from megatron_vila.data.sources.pieces import PieceCache
from megatron_vila.data.sources.source import ChangedFileError
from megatron_vila.data.sources.tar import Read
from megatron_vila.plan.budgets import GIB

PIECE = 2**21
"""Bytes of the largest piece: one request. ``docs/benchmarks.md`` has what other sizes cost."""

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each new attempt at what failed."""

TIME_LIMIT_S = 60.0
"""Seconds that one attempt may take."""

LARGEST_INDEX = 2**36

_AT_ONCE = 32
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError, ImportError)
# The names of an fsspec entry that say which version of a file it is, the surest first.
_TAGS = ("ETag", "etag", "generation", "md5Hash", "VersionId", "LastModified", "Last-Modified", "mtime", "created")

T = TypeVar("T")


class UnreachableError(ChangedFileError):
    """What lies elsewhere cannot be read, and not for a moment only."""


def is_address(path: str) -> bool:
    """Whether ``path`` is an address, not a path of this machine."""
    return "://" in path


class RemoteFolder:
    """The folder at an address: a ``Folder``. Raises ``RecordError`` if what reads such an address is not installed."""

    def __init__(self, path: str, data: DataConfig) -> None:
        self.path = self.identity = path.rstrip("/")
        self._files, self._root = _file_system(self.path)
        folder = Path(data.cache_dir) if data.cache_dir else kept_folder("pieces")
        if folder is None:
            raise RecordError(
                f"{path}: there is no home folder to keep pieces of it in; set data.cache_dir to a folder"
            )
        self._cache = PieceCache(folder, int(data.cache_gib * GIB))
        self._states: dict[str, tuple[int, str]] = {}

    def place(self, name: str) -> str:
        return f"{self.path}/{name}"

    def content(self, name: str) -> bytes | None:
        try:
            size, _ = self._state(name)
        except FileNotFoundError:
            return None
        except UnreachableError as error:
            raise RecordError(str(error)) from error
        if size > LARGEST_SMALL_FILE:
            raise RecordError(f"{self.place(name)}: more than {LARGEST_SMALL_FILE:,} bytes")
        return self._asked(name, lambda: self._fetched(name, 0, size))

    def state(self, name: str) -> tuple[int, str]:
        return self._asked(name, lambda: self._state(name))

    def states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self.state, names))

    def quick_states(self, names: Sequence[str]) -> list[tuple[int, str]]:
        return []

    @contextlib.contextmanager
    def as_file(self, name: str) -> Iterator[str]:
        size, _ = self.state(name)
        if size > LARGEST_INDEX:
            raise RecordError(f"{self.place(name)}: more than {LARGEST_INDEX:,} bytes")
        with tempfile.NamedTemporaryFile(suffix=posixpath.basename(name)) as file:
            for first in range(0, size, 2**25):
                file.write(self._asked(name, partial(self._fetched, name, first, min(2**25, size - first))))
            file.flush()
            yield file.name

    @contextlib.contextmanager
    def opened(self, name: str, size: int, start: int, end: int) -> Iterator[tuple[Read, Storage | None]]:
        storage = _Sample(self, name, self._known_state(name, size), start, end)
        yield storage.read, storage

    def piece(self, name: str, state: str, first: int, end: int, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of a shard, out of its piece from ``first`` to ``end``. Raises ``ChangedFileError``."""
        group = f"{self.place(name)} {state}"
        return self._cache.read(group, first, end, offset, size, lambda: self._fetched(name, first, end - first, state))

    def _known_state(self, name: str, size: int) -> str:
        """The state of a shard that must have ``size`` bytes, asked for once. Raises ``ChangedFileError``."""
        if name not in self._states:
            try:
                self._states[name] = self._state(name)
            except FileNotFoundError as error:
                raise ChangedFileError(_gone(self.place(name))) from error
        found, state = self._states[name]
        if found != size:
            raise ChangedFileError(changed(self.place(name), found, size))
        return state

    def _state(self, name: str) -> tuple[int, str]:
        """Raises ``FileNotFoundError`` and ``UnreachableError``."""

        def ask() -> tuple[int, str]:
            self._files.invalidate_cache()
            entry = self._called("info", f"{self._root}/{name}")
            if entry.get("type") == "directory" or not isinstance(entry.get("size"), int):
                raise FileNotFoundError(f"{self.place(name)}: no file of a known size")
            return entry["size"], next((f"{tag} {entry[tag]}" for tag in _TAGS if entry.get(tag)), str(entry["size"]))

        return self._tried(name, ask)

    def _fetched(self, name: str, first: int, size: int, state: str = "") -> bytes:
        """``size`` bytes of a file, all of them. Where they cannot be had, it is asked whether the file still has ``state``."""

        def ask() -> bytes:
            content = self._called("cat_file", f"{self._root}/{name}", start=first, end=first + size) if size else b""
            if len(content) != size:
                raise OSError(f"{size:,} bytes from byte {first:,} were asked for, and {len(content):,} came")
            return content

        try:
            return self._tried(name, ask)
        except FileNotFoundError as error:
            raise ChangedFileError(_gone(self.place(name))) from error
        except UnreachableError as error:
            if state and self._state_now(name) != state:
                raise ChangedFileError(
                    f"{self.place(name)}: the shard was changed while the run reads it; start again"
                ) from error
            raise

    def _state_now(self, name: str) -> str:
        try:
            return self._state(name)[1]
        except (FileNotFoundError, UnreachableError):
            return ""

    def _called(self, method: str, path: str, **options: Any) -> Any:
        """A method of the file system, with a limit of time where it can have one."""
        own = getattr(self._files, f"_{method}", None)
        if getattr(self._files, "async_impl", False) and own is not None:
            from fsspec.asyn import sync  # type: ignore[import-untyped]

            return sync(self._files.loop, own, path, timeout=TIME_LIMIT_S, **options)
        return getattr(self._files, method)(path, **options)

    def _tried(self, name: str, ask: Callable[[], T]) -> T:
        """What ``ask`` gives, tried again after what may be over in a moment.

        Raises ``FileNotFoundError``, ``UnreachableError``.
        """
        for wait_s in (*WAITS_S, None):
            try:
                return ask()
            except _LASTING as error:
                if not isinstance(error, FileNotFoundError):
                    raise UnreachableError(f"{self.place(name)}: cannot be read: {_said(error)}") from error
                if not _hides_another(error):
                    raise
                failure: BaseException = error.__cause__ or error
            except Exception as error:
                failure = error
            if wait_s is None:
                raise UnreachableError(
                    f"{self.place(name)}: cannot be read after {len(WAITS_S) + 1} attempts: {_said(failure)}; look at the "
                    "network and the storage, and start again"
                ) from failure
            time.sleep(wait_s)
        raise AssertionError

    def _asked(self, name: str, ask: Callable[[], T]) -> T:
        """What ``ask`` gives, at the start of a run."""
        try:
            return ask()
        except FileNotFoundError as error:
            raise RecordError(
                f"{self.place(name)}: there is no such file; prepare the folder again, or name another"
            ) from error
        except ChangedFileError as error:
            raise RecordError(str(error)) from error


class _Sample:
    """The bytes from ``start`` to ``end`` of a shard: a ``Storage``."""

    def __init__(self, folder: RemoteFolder, name: str, state: str, start: int, end: int) -> None:
        self._folder, self._name, self._start, self._end = folder, name, start, end
        self.state = state

    def read(self, offset: int, size: int) -> bytes:
        parts, stop = [], min(offset + size, self._end)
        while offset < stop:
            first = self._start + (offset - self._start) // PIECE * PIECE
            end = min(first + PIECE, self._end)
            parts.append(self._folder.piece(self._name, self.state, first, end, offset, min(stop, end) - offset))
            offset = end
        return b"".join(parts)


def _file_system(path: str) -> tuple[Any, str]:
    """What reads the address ``path``, and how it calls it."""
    if importlib.util.find_spec("fsspec") is None:
        raise RecordError(
            f"{path}: addresses are read by fsspec, which is not installed: pip install 'megatron-vila[remote]'"
        )
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        files, root = url_to_fs(path)
    except ImportError as error:
        raise RecordError(
            f"{path}: what reads such an address is not installed: {' '.join(str(error).split())}"
        ) from error
    except Exception as error:
        raise RecordError(f"{path}: not an address that can be read: {_said(error)}") from error
    return files, str(root).rstrip("/")


def _hides_another(error: FileNotFoundError) -> bool:
    """Whether a missing file is only what fsspec makes of another failure, as it does for all of them over HTTP."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if status is not None:
        return status not in (404, 410)
    # Connections that are refused or cut are errors of the system, or of the HTTP client alone.
    fails = isinstance(cause, OSError) and not isinstance(cause, _LASTING)
    return fails or type(cause).__module__.startswith("aiohttp")


def _gone(place: str) -> str:
    return f"{place}: the shard is gone since it was opened; put it back and start again"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

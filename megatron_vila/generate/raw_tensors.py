"""The bytes of many tensors, one after the other, as one file: written and read at the speed of the disk.

Several threads each move one block at a time through a page-locked buffer. They go past the page cache where the file system lets
them (O_DIRECT): 30 GiB that are read once would only push other files out of it. Each block has a checksum (xxh3), which costs a
thread far less than the disk takes for the block. The file ends with zeros up to a whole page.
"""

from __future__ import annotations

import errno
import itertools
import os
import queue
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_vila import accelerator
from megatron_vila.checkpoint.io import open_plain
from megatron_vila.errors import DamagedError
from megatron_vila.host_memory import page_locked

BLOCK = 1 << 24
"""Bytes of a file that are moved at once and share a checksum."""

THREADS = 8
"""Threads, each with one block under way: enough requests to keep a fast disk busy while some threads sum and copy."""

_PAGE = 1 << 12
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
"""how a file system refuses to go past the page cache"""


def file_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Size of the file that holds ``tensors``."""
    return -(-sum(x.nbytes for x in tensors) // _PAGE) * _PAGE


def write_tensors(path: Path, tensors: Sequence[torch.Tensor]) -> list[str]:
    """Write the new file ``path``; returns the checksum of each block. ``tensors`` are contiguous, on any devices.

    The file is on the disk when this returns. Raises ``OSError``.
    """
    parts, size = _Parts(tensors), file_bytes(tensors)
    with _File.create(path, size) as file, _Blocks(size) as blocks:

        def write(block: memoryview, buffer: torch.Tensor, begin: int) -> str:
            filled = parts.copy(begin, buffer, lambda part, room: room.copy_(part, non_blocking=True))
            buffer[filled:] = 0
            blocks.wait()
            file.write(block, begin)
            return xxhash.xxh3_64_hexdigest(block)

        sums = blocks.each(write)
        file.flush()
    return sums


def read_tensors(path: Path, tensors: Sequence[torch.Tensor], sums: Sequence[str]) -> None:
    """Fill ``tensors`` (contiguous, shapes and dtypes of those that were written) from ``path`` and check the ``sums``.

    The current stream may use them when this returns. Raises ``DamagedError`` for a file that is missing, cut off or not what was
    written (then the tensors hold anything), ``CheckpointError`` if the system refuses to open it, ``OSError`` if reading fails.
    """
    parts, size = _Parts(tensors), file_bytes(tensors)
    if len(sums) != -(-size // BLOCK):
        raise DamagedError(f"{path.name} has {len(sums)} checksums for {size:,} bytes")
    with _File.open(path, size) as file, _Blocks(size) as blocks:

        def read(block: memoryview, buffer: torch.Tensor, begin: int) -> None:
            file.read(block, begin)
            if xxhash.xxh3_64_hexdigest(block) != sums[begin // BLOCK]:
                raise DamagedError(
                    f"{path.name} is damaged: bytes {begin:,} to {begin + len(block):,} are not what was written"
                )
            parts.copy(begin, buffer, lambda part, room: part.copy_(room, non_blocking=True))
            blocks.wait()

        blocks.each(read)


class _Parts:
    """The bytes of tensors as one sequence."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._bytes = [x.view(torch.uint8).view(-1) for x in tensors if x.nbytes]
        self._ends = list(itertools.accumulate(len(x) for x in self._bytes))

    def copy(self, begin: int, buffer: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], object]) -> int:
        """``copy(bytes of a tensor, their room)`` for what lies in the buffer if its first byte is byte ``begin``; returns how
        many bytes they fill."""
        filled, number = 0, bisect_right(self._ends, begin)
        while filled < len(buffer) and number < len(self._bytes):
            part, end = self._bytes[number], self._ends[number]
            count = min(len(buffer) - filled, end - begin - filled)
            first = len(part) - (end - begin - filled)
            copy(part[first : first + count], buffer[filled : filled + count])
            filled, number = filled + count, number + 1
        return filled


class _Blocks:
    """Threads that work on the blocks of ``size`` bytes, each with a page-locked buffer, and a stream for their copies."""

    def __init__(self, size: int) -> None:
        self._size = size
        count = max(1, min(THREADS, -(-size // BLOCK)))
        memory = page_locked(
            count * BLOCK, f"the number of ranks on this machine (each takes {count * BLOCK >> 20} MiB)"
        )
        self._buffers: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for buffer in memory.split(BLOCK):
            self._buffers.put(buffer)
        cuda = accelerator.cuda()
        self._stream = cuda.Stream()
        # What was queued before may still write to the tensors, or read memory that became theirs.
        self._stream.wait_stream(cuda.current_stream())
        self._threads = ThreadPoolExecutor(count)

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def each(self, work: Callable[[memoryview, torch.Tensor, int], Any]) -> list[Any]:
        """What ``work(buffer, the same as a tensor, first byte)`` returns for each block. The first error ends the work."""

        # The modes of torch belong to a thread: caches are made in inference mode.
        @torch.inference_mode()
        def with_buffer(begin: int) -> Any:
            buffer = self._buffers.get()
            try:
                block = buffer[: self._size - begin]
                with accelerator.cuda().stream(self._stream):
                    return work(block.numpy().data, block, begin)
            finally:
                self._buffers.put(buffer)

        return list(self._threads.map(with_buffer, range(0, self._size, BLOCK)))

    def wait(self) -> None:
        """Until the copies that were queued are done."""
        self._stream.record_event().synchronize()


class _File:
    """A plain file that is read and written at any place, past the page cache while its file system does that."""

    def __init__(self, path: Path, descriptor: int, flags: int) -> None:
        self._path, self._cached, self._direct = path, descriptor, -1
        self._closing = [descriptor]
        try:
            self._direct = os.open(path, flags | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._closing.append(self._direct)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                os.close(descriptor)
                raise

    @classmethod
    def create(cls, path: Path, size: int) -> _File:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(descriptor, size)
        return cls(path, descriptor, os.O_WRONLY)

    @classmethod
    def open(cls, path: Path, size: int) -> _File:
        with open_plain(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedError(f"{path.name} has {found:,} bytes instead of {size:,}")
            return cls(path, os.dup(file.fileno()), os.O_RDONLY)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._closing:
            os.close(descriptor)

    def read(self, room: memoryview, offset: int) -> None:
        """Fill ``room`` from byte ``offset`` on."""
        if self._move(os.preadv, room, offset) < len(room):
            raise DamagedError(f"{self._path.name} ends before byte {offset + len(room):,}")

    def write(self, block: memoryview, offset: int) -> None:
        """Put ``block`` at byte ``offset``."""
        self._move(os.pwritev, block, offset)

    def flush(self) -> None:
        """Force everything to the disk."""
        os.fsync(self._cached)

    def _move(self, move: Callable[[int, list[memoryview], int], int], block: memoryview, offset: int) -> int:
        """Bytes of ``block`` that were moved: all, but for what lies behind the end of the file."""
        moved = 0
        while moved < len(block):
            try:
                count = move(self._direct if self._direct >= 0 else self._cached, [block[moved:]], offset + moved)
            except OSError as error:
                # Some file systems let it be opened so, and then want it in another way.
                if self._direct < 0 or error.errno not in _NOT_DIRECT:
                    raise
                self._direct = -1
                continue
            if not count:
                break
            moved += count
        return moved

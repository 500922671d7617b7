"""Memory and cores of the host, as far as a rank of this node may use them."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.errors import UserError
from megatron_vila.plan.budgets import GIB


class HostMemoryError(UserError, MemoryError):
    """The host does not page-lock as much memory as a setting asks for."""


def most_bytes() -> int:
    """Memory of this machine, within the container's limit."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _limit()
    return total if limit is None else min(total, limit)


def free_bytes() -> int:
    """Bytes of this machine's memory that are free or can be freed, within the container's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, limit = int(fields["MemAvailable"].split()[0]) * 1024, _limit()
    if limit is None:
        return available
    return min(available, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))


def _limit() -> int | None:
    """The container's limit of memory, if it has one."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return int(text) if text.isdigit() else None


def ranks_here() -> int:
    """Ranks of this run on this machine, as far as it can be told."""
    on_node = os.environ.get("LOCAL_WORLD_SIZE")
    started = dist.get_world_size() if dist.is_initialized() else 1
    return int(on_node) if on_node else min(started, torch.cuda.device_count() or started)


def cores_of_rank() -> int:
    """This rank's share of the cores that the process may use, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here())


def decoding_threads() -> int:
    """Threads that decode on a rank: its cores but for those of the thread that trains and of autograd's, where it has enough."""
    cores = cores_of_rank()
    return cores - 2 if cores >= 8 else max(1, cores - 1) if cores >= 4 else cores


def page_locked(size: int, setting: str) -> torch.Tensor:
    """``size`` bytes of zeros in host memory, page-locked where there is CUDA for as long as the returned tensor itself lives.
    They begin where a page does.

    torch's own allocator rounds sizes up to powers of two; this one takes what it is asked for, in huge pages where the system
    has them. Raises ``HostMemoryError`` that names ``setting`` (``name=value``).
    """
    if not size:
        return torch.zeros(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A system without huge pages refuses.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if not torch.cuda.is_available():
        return buffer
    # Pages come into being when they are written to, here by all cores instead of the one that locks them.
    with all_threads():
        buffer.zero_()
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()
    error = int(runtime.cudaHostRegister(address, size, 0))
    if error:
        raise HostMemoryError(
            f"the host does not page-lock {size / GIB:.1f} GiB more for this rank (CUDA error {error}); lower {setting}, or "
            "raise the limit of locked memory (ulimit -l, or --ulimit memlock=-1 of the container)"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return buffer


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """This rank's share of the cores: torchrun leaves a process one thread, too few for gigabytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, cores_of_rank()))
    try:
        yield
    finally:
        torch.set_num_threads(before)

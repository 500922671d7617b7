"""Tensors saved between forward and backward pass, on the device or, up to a budget, in page-locked host memory.

What is saved first is needed last, so the first tensors go to the host and the rest stay on the device. Copies run on a stream
of their own: to the host while the next layers compute, and back while a later block of layers is in its backward pass.
"""

from __future__ import annotations

import torch

from megatron_vila.host_memory import page_locked
from megatron_vila.plan.budgets import GIB


class Saved:
    """A tensor that stays where it is."""

    def __init__(self, *here: torch.Tensor) -> None:
        self._here = list(here)

    def prefetch(self) -> None:
        """Start to bring the tensor back to the device."""

    def take(self) -> torch.Tensor:
        """The tensor on its device. Can be called once: the tensor is not held any longer."""
        return self._here.pop()


class HostStore:
    """Buffers in host memory, used again from step to step, of at most ``budget_bytes`` together.

    On a CPU the buffers are ordinary memory and copies are immediate, so that the same code runs without a GPU.
    """

    def __init__(self, budget_bytes: int, device: torch.device) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = self.peak_bytes = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and budget_bytes else None
        self._free: list[torch.Tensor] = []

    def save(self, x: torch.Tensor) -> Saved:
        """Hold ``x`` until ``take``; nobody may write to it meanwhile. It stays on its device when the budget is used up."""
        buffer = self._acquire(x.nbytes) if x.nbytes else None
        return Saved(x) if buffer is None else _SavedOnHost(x, buffer, self)

    def _acquire(self, size: int) -> torch.Tensor | None:
        """A buffer of ``size`` bytes or more; None if the budget has no room for it.

        A free buffer is used if it is at most twice as large. If the budget has no room for a new one, any larger buffer is used
        before others are given up, because page-locking takes seconds. Raises ``HostMemoryError`` if the host does not page-lock
        as much.
        """
        held = self.used_bytes + sum(buffer.nbytes for buffer in self._free)
        most = 2 * size if held + size <= self.budget_bytes else self.budget_bytes
        fitting = [i for i, buffer in enumerate(self._free) if size <= buffer.nbytes <= most]
        if fitting:
            buffer = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        elif self.used_bytes + size > self.budget_bytes:
            return None
        else:
            if held + size > self.budget_bytes:
                self._make_room(size)
            buffer = page_locked(size, f"memory.offload_gib={self.budget_bytes / GIB:g}")
        self.used_bytes += buffer.nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def _make_room(self, size: int) -> None:
        """Give up free buffers until one of ``size`` bytes fits into the budget; the one that became free first goes first."""
        if self.stream is not None:
            # A copy from one of them may still be on its way.
            self.stream.synchronize()
        cached = sum(buffer.nbytes for buffer in self._free)
        while self._free and self.used_bytes + cached + size > self.budget_bytes:
            cached -= self._free.pop(0).nbytes

    def scale(self, factor: int) -> None:
        """Page-lock now what rows ``factor`` times as long as those so far will need, as far as the budget goes.

        Otherwise the first of these rows would wait for the page-locking. Nothing may be saved at present. Raises
        ``HostMemoryError``.
        """
        # What is saved first is released last.
        sizes = [factor * buffer.nbytes for buffer in reversed(self._free)]
        self._make_room(self.budget_bytes)
        for size in sizes:
            if size <= self.budget_bytes - sum(buffer.nbytes for buffer in self._free):
                self._free.append(page_locked(size, f"memory.offload_gib={self.budget_bytes / GIB:g}"))

    def release(self, buffer: torch.Tensor) -> None:
        self.used_bytes -= buffer.nbytes
        self._free.append(buffer)


class _SavedOnHost(Saved):
    """A tensor in host memory. All copies are on one stream, so a buffer is never overwritten before it was read."""

    def __init__(self, x: torch.Tensor, buffer: torch.Tensor, host: HostStore) -> None:
        super().__init__()
        self._host, self._shape, self._size = host, x.shape, x.nbytes
        self._buffer, self._like = buffer, x.new_empty(0)
        if host.stream is None:
            self._view(x.dtype).copy_(x)
            return
        host.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(host.stream):
            self._view(x.dtype).copy_(x, non_blocking=True)
        # The device memory is free for others once the copy is done.
        x.record_stream(host.stream)

    def prefetch(self) -> None:
        if self._here:
            return
        back = self._like.new_empty(self._shape)
        self._here.append(back)
        if self._host.stream is None:
            back.copy_(self._view(back.dtype))
            return
        # The memory of the copy may still be in use by kernels that are queued.
        self._host.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._host.stream):
            back.copy_(self._view(back.dtype), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def take(self) -> torch.Tensor:
        self.prefetch()
        if self._host.stream is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
        self._host.release(self._buffer)
        return super().take()

    def _view(self, dtype: torch.dtype) -> torch.Tensor:
        return self._buffer[: self._size].view(dtype).view(self._shape)

"""Buffers of the GPUs of a node that the other GPUs write into: an exchange is one strided copy over NVLink to its destination,
without the packing and staging of a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from megatron_vila import accelerator
from megatron_vila.parallel.agreement import gathered
from megatron_vila.plan.budgets import MOST_PEER_BYTES, peer_buffer_bytes

TIMEOUT_MS = 30 * 60 * 1000
"""How long a GPU waits for one whose process is late or gone, as ``processes.init_distributed`` has it for process groups."""


class PeerMemory:
    """One buffer per rank of ``group``, mapped into the memory of all of them (PyTorch's symmetric memory).

    Protocol of an exchange: ``reserve``; ``barrier`` (all ranks have read the exchange before); writes into ``view``s of the
    others inside ``beside``; ``barrier`` (everything has arrived); reads. Everything is ordered with the current stream; the host
    does not wait. Values that are not read at once come with an ``Arrival``, which refuses a read after the next ``reserve``.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.exchanges, self._bytes = 0, 0
        self._buffer: Any = None
        self._handle: Any = None
        self._stream = accelerator.cuda().Stream()

    @classmethod
    def of(cls, group: dist.ProcessGroup, device: torch.device) -> PeerMemory | None:
        """None where the ranks of ``group`` cannot write into each other: on CPUs, on several nodes, without peer access, or
        where every process sees one GPU only. All-gather over ``group``."""
        if group.size() == 1 or device.type != "cuda":
            return None
        boot, here = Path("/proc/sys/kernel/random/boot_id").read_text(), torch.cuda.current_device()
        places = gathered((boot, here), group)
        others = {index for _, index in places} - {here}
        reaches = len(set(places)) == group.size() == len(others) + 1 and all(
            torch.cuda.can_device_access_peer(here, other) for other in others
        )
        return cls(group, torch.device("cuda", here)) if all(gathered(reaches, group)) else None

    def reserve(self, nbytes: int) -> bool:
        """Begin an exchange of at most ``nbytes``, the same number on all ranks; False if it would exceed ``MOST_PEER_BYTES``.

        Collective over the group where they have to grow; raises ``torch.OutOfMemoryError`` if the GPU has no room for that.
        """
        if nbytes > MOST_PEER_BYTES:
            return False
        if nbytes > self._bytes:
            torch.cuda.synchronize()  # the old buffers are not read any more
            dist.barrier(self._group)
            self._buffer = self._handle = None
            torch.cuda.empty_cache()  # memory that PyTorch's allocator keeps in reserve cannot be used for the buffers
            self._bytes = peer_buffer_bytes(nbytes)
            try:
                self._buffer = symmetric_memory.empty(self._bytes, dtype=torch.uint8, device=self._device)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                raise torch.OutOfMemoryError(
                    f"no room for the {self._bytes / 2**20:.0f} MiB through which GPUs exchange heads: CUDA out of memory"
                ) from error
            self._handle = symmetric_memory.rendezvous(self._buffer, self._group)
        self.exchanges += 1
        return True

    def arrival(self) -> Arrival:
        """The arrival of the exchange that is under way."""
        return Arrival(self, self.exchanges)

    def view(self, rank: int, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Part of the buffer of ``rank`` from element ``first`` on."""
        return self._handle.get_buffer(rank, shape, dtype, first)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Writes to others inside the ``with`` block run on a stream beside later work of this GPU, up to ``barrier``."""
        self._stream.wait_stream(accelerator.cuda().current_stream())
        with accelerator.cuda().stream(self._stream):
            yield

    def barrier(self) -> None:
        """Later work on the current stream of each rank waits for earlier work on that of all others.

        If one does not come within ``TIMEOUT_MS``, the next CUDA call of those that wait raises ``RuntimeError``.
        """
        torch.cuda.current_stream().wait_stream(self._stream)
        self._handle.barrier(timeout_ms=TIMEOUT_MS)


@dataclass(frozen=True)
class Arrival:
    """Guards the values that exchange number ``exchange`` has brought into the buffer of ``peers``, until the next one begins."""

    peers: PeerMemory
    exchange: int

    def wait(self) -> None:
        """Raises ``RuntimeError`` if another exchange has begun, whose values may stand there now."""
        if self.peers.exchanges != self.exchange:
            raise RuntimeError(
                f"what exchange {self.exchange} brought was asked for after exchange {self.peers.exchanges} had begun, which "
                "writes to the same memory: wait for an exchange before starting the next one"
            )

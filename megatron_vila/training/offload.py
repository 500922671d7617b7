"""Adam's state in host memory, streamed through the device.

A share of the float32 main weights and of both moments lives in page-locked host memory, the rest on the device. A step brings
the host's share to the device chunk by chunk, updates it there and takes it back. Copies in, updates and copies out run on three
streams, so a step takes about as long as the link needs for 12 bytes per parameter in one direction.

Megatron-Core's ``HybridDeviceOptimizer`` (the same file in 0.16.1 and 0.19.2) updates its share on the host: gradients go out and
weights come back, but Adam runs at the speed of the host's cores, and gradients take 4 more bytes per parameter there. It also
builds each state twice, first for whole parameters, and leaves the main weights pageable.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.optim.adamw import adamw

from megatron_vila import accelerator
from megatron_vila.checkpoint.optimizer_shards import take_main_weights
from megatron_vila.host_memory import page_locked

CHUNK_ELEMENTS = 2**23
"""Elements of a chunk, which is updated at once. Its state takes up to 96 MiB in one of ``SLOTS`` slots on the device."""

SLOTS = 3
"""Chunks on the device: one on its way in, one in use, one on its way out."""


def offload_state(optimizer: DistributedOptimizer, fraction: float) -> None:
    """Give ``optimizer`` its state, the share ``fraction`` of it on the host.

    ``optimizer`` must not have made a step, and must be configured to put the gradients of its shards beside the 16-bit weights
    (``use_precision_aware_optimizer_no_fp8_or_ds_fp8``). No collectives. Raises ``HostMemoryError`` if the host does not
    page-lock as much.
    """
    inner = optimizer.optimizer
    if inner is not None:  # a rank without anything to train
        optimizer.optimizer = StreamedAdam(inner.param_groups, fraction)


class StreamedAdam(torch.optim.Optimizer):
    """AdamW on float32 main weights, with ``fraction`` of all state in host memory.

    The parameters are flat shards of the model's weights. ``state`` has their ``exp_avg`` and ``exp_avg_sq`` and, for 16-bit
    ones, the main weights as ``master_param``; they are views of one buffer for all shards of a group, dtype and place. The
    gradient of a shard is its ``decoupled_grad``. ``grad_scale`` multiplies the gradients of the next step. ``fraction`` counts
    elements; the parameter that crosses it goes to the host as a whole.
    """

    def __init__(self, groups: list[dict[str, Any]], fraction: float) -> None:
        super().__init__(groups, {"step": 0})
        self.grad_scale = 1.0
        self._inward, self._outward = accelerator.cuda().Stream(), accelerator.cuda().Stream()
        self._sections = [
            _Section(group, shards, f"optim.offload_fraction={fraction:g}" if on_host else "")
            for group, shards, on_host in _alike(self.param_groups, fraction)
        ]
        for section in self._sections:
            self.state.update(section.views())
        take_main_weights(self)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all weights of this rank; returns nothing. No copy to the host is under way when it returns."""
        for group in self.param_groups:
            group["step"] += 1
        # The chunks on the device are updated while the next ones come from the host. A rank with any state has some on the host.
        here, there = self._chunks(on_host=False), self._chunks(on_host=True)
        per_arrival = -(-len(here) // max(len(there), 1))
        for index, (chunk, state) in enumerate(self._streamed(there)):
            for own in here[index * per_arrival : (index + 1) * per_arrival]:
                own.update(own.state, self.grad_scale)
            chunk.update(state, self.grad_scale)
        self.grad_scale = 1.0

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of state and main weights on the device, and on the host."""
        held = {True: 0, False: 0}
        for section in self._sections:
            held[section.on_host] += section.state.nbytes
        return held[False], held[True]

    def _chunks(self, on_host: bool) -> list[_Chunk]:
        return [chunk for section in self._sections if section.on_host == on_host for chunk in section.chunks]

    def _streamed(self, chunks: list[_Chunk]) -> Iterator[tuple[_Chunk, torch.Tensor]]:
        """Each chunk with its state on the device; when the next one is asked for, the changed state goes back to the host."""
        if not chunks:
            return
        cuda, device = accelerator.cuda(), chunks[0].device
        work = cuda.current_stream()
        size = max(chunk.state.nbytes for chunk in chunks)
        slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        # Queued kernels may still use the memory of the slots.
        self._inward.wait_stream(work)
        left: dict[int, Any] = {}

        def bring(index: int) -> tuple[torch.Tensor, Any]:
            on_host, slot = chunks[index].state, index % SLOTS
            state = slots[slot][: on_host.nbytes].view(on_host.dtype).view(on_host.shape)
            if slot in left:
                self._inward.wait_event(left[slot])
            with cuda.stream(self._inward):
                _copy_rows(state, on_host)
                return state, self._inward.record_event()

        ahead = deque(bring(index) for index in range(min(SLOTS - 1, len(chunks))))
        for index, chunk in enumerate(chunks):
            state, arrived = ahead.popleft()
            work.wait_event(arrived)
            yield chunk, state
            self._outward.wait_stream(work)
            with cuda.stream(self._outward):
                _copy_rows(chunk.state, state)
                left[index % SLOTS] = self._outward.record_event()
            if index + SLOTS - 1 < len(chunks):
                ahead.append(bring(index + SLOTS - 1))
        self._outward.synchronize()


class _Section:
    """The state of shards of one group and dtype: rows of moments and, for 16 bits, of main weights, in one place."""

    def __init__(self, group: dict[str, Any], shards: list[torch.Tensor], setting: str) -> None:
        """``setting`` names what moves the state to the host; empty: it is on the device."""
        self.group, self.shards, self.on_host = group, shards, bool(setting)
        is_16_bit = shards[0].element_size() == 2
        self.dtype = torch.float32 if is_16_bit else shards[0].dtype
        rows, size = 2 + is_16_bit, sum(shard.numel() for shard in shards)
        if self.on_host:
            self._buffer = page_locked(rows * size * self.dtype.itemsize, setting)
            self.state = self._buffer.view(self.dtype).view(rows, size)
        else:
            self.state = torch.zeros(rows, size, dtype=self.dtype, device=shards[0].device)
        self.chunks = list(self._cut(size))

    def views(self) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """The state of each shard."""
        names = ("exp_avg", "exp_avg_sq", "master_param")[: len(self.state)]
        per_shard = zip(*(row.split([shard.numel() for shard in self.shards]) for row in self.state), strict=True)
        return {
            shard: dict(zip(names, views, strict=True)) for shard, views in zip(self.shards, per_shard, strict=True)
        }

    def _cut(self, size: int) -> Iterator[_Chunk]:
        for start in range(0, size, CHUNK_ELEMENTS):
            stop, begin, pieces = min(start + CHUNK_ELEMENTS, size), 0, []
            for shard in self.shards:
                low, high = max(start, begin), min(stop, begin + shard.numel())
                if low < high:
                    pieces.append((shard, slice(low - begin, high - begin)))
                begin += shard.numel()
            yield _Chunk(self.group, self.state[:, start:stop], pieces)


@dataclass(frozen=True)
class _Chunk:
    """``state`` [rows, elements] of parts of some shards."""

    group: dict[str, Any]
    state: torch.Tensor
    pieces: list[tuple[torch.Tensor, slice]]

    @property
    def device(self) -> torch.device:
        return self.pieces[0][0].device

    def update(self, state_RE: torch.Tensor, grad_scale: float) -> None:
        """Make the step of this chunk with its state on the device, main weights copied back to the model included."""
        sizes = [part.stop - part.start for _, part in self.pieces]
        gradients_E = torch.empty_like(state_RE[0])
        gradients = list(gradients_E.split(sizes))
        torch._foreach_copy_(gradients, [shard.decoupled_grad[part] for shard, part in self.pieces])  # type: ignore[attr-defined]
        if grad_scale != 1.0:
            gradients_E.mul_(grad_scale)
        weights = [shard[part] for shard, part in self.pieces]
        moments, squares, *mains = (list(row.split(sizes)) for row in state_RE)
        adamw(
            mains[0] if mains else weights,
            gradients,
            moments,
            squares,
            [],
            # Steps done, one number per tensor: the function counts each of them up.
            list(torch.full((len(sizes),), self.group["step"] - 1.0, device=self.device).unbind()),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.group["betas"][0],
            beta2=self.group["betas"][1],
            lr=self.group["lr"],
            weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
        )
        if mains:
            torch._foreach_copy_(weights, mains[0])


def _alike(groups: list[dict[str, Any]], fraction: float) -> Iterator[tuple[dict[str, Any], list[torch.Tensor], bool]]:
    """Lists of shards of the same group, dtype and place, each with the group and whether the place is the host."""
    wanted, taken = fraction * sum(shard.numel() for group in groups for shard in group["params"]), 0
    for group in groups:
        alike: dict[tuple[torch.dtype, bool], list[torch.Tensor]] = defaultdict(list)
        for shard in group["params"]:
            on_host = taken < wanted
            taken += shard.numel() * on_host
            alike[shard.dtype, on_host].append(shard)
        for (_, on_host), shards in alike.items():
            yield group, shards, on_host


def _copy_rows(target_RE: torch.Tensor, source_RE: torch.Tensor) -> None:
    """Copy row by row, because only contiguous memory is copied without the CPU's help."""
    for target_E, source_E in zip(target_RE, source_RE, strict=True):
        target_E.copy_(source_E, non_blocking=True)

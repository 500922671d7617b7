"""Memory per rank: what was predicted, what is held, and the peak; and the message when it did not suffice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vila import accelerator
from megatron_vila.config.schema import Config
from megatron_vila.parallel.agreement import gathered
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.memory import estimate_memory, memory_cure
from megatron_vila.training.offload import StreamedAdam
from megatron_vila.training.report_files import Reporting
from megatron_vila.training.summary import write_json

MEMORY_FILE = "memory.json"


def write_memory_report(
    config: Config, model: DistributedDataParallel, optimizer: DistributedOptimizer, host_peak_bytes: int
) -> str:
    """Write memory.json into the run's folder (rank 0) and return a line that compares prediction and peak.

    Per rank in GiB: weights, gradient buffers, optimizer state and main weights on the device, what was moved to host memory
    (``host_peak_bytes`` of activations, and optimizer state), and the peak since the first step. An all-gather over all ranks.
    """
    on_device, on_host = _optimizer_bytes(optimizer)
    mine = {
        "rank": dist.get_rank(),
        "weights": _gib(model.parameters()),
        "gradients": _gib(buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)),
        "optimizer": round(on_device / GIB, 6),
        "host": round((host_peak_bytes + on_host) / GIB, 6),
        "peak": round(accelerator.peak_memory_bytes() / GIB, 6),
    }
    ranks = gathered(mine)
    estimate = estimate_memory(config, dist.get_world_size(), accelerator.device_memory_bytes())
    predicted = {name: round(size / GIB, 6) for name, size in vars(estimate).items()} | {"total": estimate.total / GIB}
    if dist.get_rank() == 0:
        path, report = Path(config.train.output) / MEMORY_FILE, {"unit": "GiB", "predicted": predicted, "ranks": ranks}
        Reporting().attempt(str(path), lambda: write_json(path, report))
    fullest = max(ranks, key=lambda rank: rank["peak"])
    return (
        f"memory of the fullest rank: {estimate.allocated / GIB:.2f} GiB predicted, {fullest['peak']:.2f} GiB measured "
        f"on rank {fullest['rank']}"
    )


def out_of_memory_message(config: Config, world_size: int, rank: int, error: Exception) -> str:
    """The message for ``error`` on ``rank``: which part of the prediction is the largest, and the setting that shrinks it."""
    estimate = estimate_memory(config, world_size, accelerator.device_memory_bytes())
    grown = max((name for name in vars(estimate) if name != "slack"), key=lambda name: getattr(estimate, name))
    return (
        f"rank {rank} is out of GPU memory ({str(error).splitlines()[0]}). Predicted for the fullest rank: {estimate}; "
        f"the largest part is {grown.replace('_', ' ')}: {memory_cure(config, estimate)}"
    )


def _optimizer_bytes(optimizer: DistributedOptimizer) -> tuple[int, int]:
    """Bytes of optimizer state and main weights on the device and in host memory."""
    inner = optimizer.optimizer
    if isinstance(inner, StreamedAdam):
        return inner.bytes_held()
    held = [value for state in inner.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held += [main for group in optimizer.shard_fp32_from_float16_groups for main in group]
    return sum(x.nbytes for x in held), 0


def _gib(tensors: Iterable[torch.Tensor | None]) -> float:
    return round(sum(x.numel() * x.element_size() for x in tensors if x is not None) / GIB, 6)

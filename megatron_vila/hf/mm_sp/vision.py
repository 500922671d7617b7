"""Vision of a Transformers model under MM-SP: each rank encodes its units, and each token is sent to the rank that owns it.

The model's own functions encode (``adapters/``), so tower, projector and pooling stay the model's. Every rank calls them equally
often, because FSDP2 gathers weights in those calls. A rank without units encodes a black one, so that all of its parameters get a
gradient (of exact zeros).

Legend: R rows of pixels of this rank, N visual tokens made here, M owned here, C columns of features (``adapters/base.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from megatron_vila import accelerator
from megatron_vila.hf.mm_sp.adapters import VisionAdapter
from megatron_vila.hf.mm_sp.data import VisionPlan
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.parallel.reshard import Reshard

KEPT_SHARE = 0.08
"""Share of a GPU's memory for what the tower's layers keep of all units until the backward pass."""


def kept_bytes(vision: PreTrainedConfig) -> float:
    """What a tower with gradient checkpointing keeps for the backward pass, in bytes for each number of its pixels: the inputs of
    its layers in 16 bits. ``vision`` is the tower's configuration; an estimate from above."""
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    numbers_of_patch = 3 * side**2 * getattr(vision, "temporal_patch_size", 1)
    return 2 * layers * vision.hidden_size / numbers_of_patch


def room_for_kept(groups: MMSPGroups, device: torch.device) -> int:
    """Bytes that may be kept, the same on all ranks; 0 on CPUs. All-reduce over ``everyone``."""
    room = torch.tensor(int(KEPT_SHARE * accelerator.device_memory_bytes()), device=device)
    dist.all_reduce(room, dist.ReduceOp.MIN, group=groups.everyone)
    return int(room)


def owned_features(
    model: nn.Module,
    adapter: VisionAdapter,
    pixels: torch.Tensor,
    plan: VisionPlan,
    groups: MMSPGroups,
    micro_batch: int,
    recompute_above: float | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Features [M, C] of the visual tokens that this rank owns, in the order of its tokens.

    ``pixels`` [R, ...] are this rank's, ``plan`` is its plan; ``options`` are passed to the adapter. At most ``micro_batch``
    units are encoded at once. If a rank has more than ``recompute_above`` numbers of pixels, the backward pass encodes again, one
    micro-batch at a time, with the same dropout.
    All-to-all over the group ``sample``, forward and backward. With dp > 1 also an all-reduce of two numbers over ``everyone``.
    """
    encode = partial(adapter.encode, model)
    rounds, rows = _agreed(plan, groups, micro_batch, pixels.device)
    is_long = recompute_above is not None and rows * pixels.shape[1:].numel() > recompute_above
    if is_long and torch.is_grad_enabled():
        # With the random numbers of the first time, since the tower may have dropout.
        encode = partial(checkpoint, partial(_to_the_end, encode), use_reentrant=False)
    made, first = [], 0
    for numbers in np.array_split(np.arange(len(plan.units)), rounds):
        units = plan.units[numbers[0] : numbers[-1] + 1] if len(numbers) else ()
        stop = first + sum(unit.rows for unit in units)
        if units:
            made.append(encode(pixels[first:stop], units, options))
        else:
            blank = adapter.blank()
            made.append(encode(pixels.new_zeros(blank.rows, *pixels.shape[1:]), (blank,), options)[:0])
        first = stop
    return Reshard.of(plan.reshard, groups.sample, pixels.device)(torch.cat(made))


def _to_the_end(encode: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """What ``encode`` returns, times a saved one. So the backward pass starts by encoding again, and does it to the end, on ranks
    whose units need other steps too; otherwise FSDP2 would gather weights in another order there."""
    features_NC = encode(*args)
    return features_NC * features_NC.new_ones(())


def _agreed(plan: VisionPlan, groups: MMSPGroups, micro_batch: int, device: torch.device) -> tuple[int, int]:
    """Number of micro-batches of units that every rank runs, and the most rows of pixels of a rank. With dp > 1 an all-reduce
    over ``everyone``."""
    most = max(1, -(-plan.most // micro_batch)), plan.most_rows
    if groups.grid.dp > 1:
        of_all = torch.tensor(most, device=device)
        dist.all_reduce(of_all, dist.ReduceOp.MAX, group=groups.everyone)
        most = tuple(of_all.tolist())
    return most

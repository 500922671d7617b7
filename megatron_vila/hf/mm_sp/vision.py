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

from megatron_vila.hf.mm_sp.adapters import VisionAdapter
from megatron_vila.hf.mm_sp.data import VisionPlan
from megatron_vila.hf.mm_sp.groups import MMSPGroups
from megatron_vila.parallel.reshard import Reshard


def owned_features(
    model: nn.Module,
    adapter: VisionAdapter,
    pixels: torch.Tensor,
    plan: VisionPlan,
    groups: MMSPGroups,
    micro_batch: int,
    recompute: bool,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Features [M, C] of the visual tokens that this rank owns, in the order of its tokens.

    ``pixels`` [R, ...] are this rank's, ``plan`` is its plan; ``options`` are passed to the adapter. At most ``micro_batch``
    units are encoded at once. With ``recompute`` the backward pass encodes again, one micro-batch at a time, with the same
    dropout.
    All-to-all over the group ``sample``, forward and backward. With dp > 1 also an all-reduce of one number over ``everyone``.
    """
    encode = partial(adapter.encode, model)
    if recompute and torch.is_grad_enabled():
        # With the random numbers of the first time, since the tower may have dropout.
        encode = partial(checkpoint, partial(_to_the_end, encode), use_reentrant=False)
    made, first = [], 0
    for numbers in np.array_split(np.arange(len(plan.units)), _rounds(plan, groups, micro_batch, pixels.device)):
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


def _rounds(plan: VisionPlan, groups: MMSPGroups, micro_batch: int, device: torch.device) -> int:
    """Number of micro-batches of units that every rank runs. With dp > 1 an all-reduce over ``everyone``."""
    rounds = max(1, -(-plan.most // micro_batch))
    if groups.grid.dp > 1:
        most = torch.tensor(rounds, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.everyone)
        rounds = int(most)
    return rounds

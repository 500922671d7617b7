"""Adam's state as sharded tensors in model space: no gathering to save, any layout to load.

Megatron's distributed optimizer gives each dp x cp rank a flat range of each parameter. A flat range of an N-dimensional
tensor is a few rectangular blocks (a part of a row, whole rows, a part of a row), and dist_checkpointing saves and loads any
set of blocks. So each rank writes what it has, in its own dtype, and reads what it needs, whichever layout wrote it. The stock
formats either keep the data-parallel layout or gather every state on every rank, in float32, and fail to load torch's Adam.

Keys: ``optimizer.exp_avg.<parameter>``, ``optimizer.exp_avg_sq.<parameter>`` and, for 16-bit parameters only,
``optimizer.main.<parameter>``, the float32 copy that Adam updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Block = tuple[tuple[int, ...], tuple[int, ...], int]


def blocks_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Block]:
    """Cut the flat row-major range [start, stop) of a tensor of ``shape`` into rectangular blocks.

    Returns (offset, size, flat start) per block, in order; each block is contiguous in the range.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,) * len(shape), (stop - start,) * len(shape), start)]
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)

    def within(index: int, low: int, high: int) -> list[Block]:
        inner = blocks_of_range(shape[1:], low, high)
        return [((index, *offset), (1, *size), index * row + flat) for offset, size, flat in inner]

    if first == last:
        return within(first, head, tail)
    blocks = within(first, head, row) if head else []
    first += head > 0
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        blocks.append(((first, *zeros), (last - first, *shape[1:]), first * row))
    return blocks + within(last, 0, tail)


def ensure_state(optimizer: DistributedOptimizer) -> None:
    """Give every parameter of this rank its (zero) Adam state, as the first step would."""
    inner = optimizer.optimizer
    if inner is None:
        return
    optimizer.init_state_fn(inner, optimizer.config)
    if _counts_per_parameter(inner):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if "step" not in inner.state[parameter]:
                    where = parameter.device if group["fused"] else "cpu"
                    inner.state[parameter]["step"] = torch.zeros((), device=where)


def get_step(optimizer: DistributedOptimizer) -> int:
    """Adam's step count. Collective over all ranks: a rank may hold no parameter."""
    inner, step = optimizer.optimizer, 0
    if inner is not None:
        counts = inner.state.values() if _counts_per_parameter(inner) else inner.param_groups
        step = next((int(count["step"]) for count in counts if "step" in count), 0)
    most = torch.tensor(step, device=optimizer.get_loss_scale().device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def set_step(optimizer: DistributedOptimizer, step: int) -> None:
    """Set Adam's step count (after ``ensure_state``)."""
    inner = optimizer.optimizer
    if inner is None:
        return
    if _counts_per_parameter(inner):
        for state in inner.state.values():
            state["step"].fill_(step)
    else:
        for group in inner.param_groups:
            group["step"] = step


def reload_main_weights(optimizer: DistributedOptimizer) -> None:
    """Take the main weights that Adam updates from the model's weights. No collectives."""
    optimizer.reload_model_params()
    if optimizer.optimizer is not None:
        take_main_weights(optimizer.optimizer)


@torch.no_grad()
def take_main_weights(adam: torch.optim.Optimizer) -> None:
    """As ``reload_main_weights`` for an Adam with main weights of its own, not Megatron's (``training/offload.py``)."""
    for shard, state in adam.state.items():
        if "master_param" in state:
            state["master_param"].copy_(shard)


def state_shards(optimizer: DistributedOptimizer, model_state: dict) -> dict[str, ShardedTensor]:
    """This rank's Adam state (after ``ensure_state``) as views, so that loading them loads the optimizer.

    ``model_state`` is the sharded state dict of the model whose parameters the optimizer holds, not yet used for anything.
    No collectives. Raises ``KeyError`` if a parameter is not in it.
    """
    entries = {id(entry.data): entry for entry in nested_values(model_state)}
    shards = {}
    for parameter in optimizer.model_param_gbuf_map:
        owned = optimizer._get_model_param_range_map(parameter)["param"]
        group, place = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        state = optimizer.optimizer.state[main]
        # With offloaded state Adam's parameters are the 16-bit weights.
        main = state.get("master_param", main)
        tensors = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        if main.dtype != parameter.dtype:
            tensors["main"] = main.detach()
        for piece, begin in _pieces(entries[id(parameter)], parameter):
            low, high = max(owned.start, begin), min(owned.end, begin + piece.data.numel())
            for offset, size, flat in blocks_of_range(tuple(piece.local_shape), low - begin, high - begin):
                at = begin + flat - owned.start
                for name, tensor in tensors.items():
                    shard = _block(
                        piece, f"optimizer.{name}.{piece.key}", tensor[at : at + math.prod(size)], offset, size
                    )
                    shards[f"{shard.key}@{'-'.join(map(str, shard.global_offset))}"] = shard
    return shards


def _pieces(
    entry: ShardedTensor | ShardedTensorFactory, parameter: torch.nn.Parameter
) -> Iterator[tuple[ShardedTensor, int]]:
    """The sharded tensors that make up a parameter (gate and up for a fused SwiGLU weight) and where each begins in it."""
    built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    for piece in nested_values({"piece": built}):
        begin, rest = divmod(piece.data.data_ptr() - parameter.data_ptr(), parameter.element_size())
        if rest or not piece.data.is_contiguous():
            raise ValueError(
                f"{piece.key} is not a contiguous part of its parameter: its optimizer state cannot be saved"
            )
        yield piece, begin


def _block(
    piece: ShardedTensor, key: str, flat: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]
) -> ShardedTensor:
    stacked = piece.prepend_axis_num
    size = (1,) * stacked + size
    return replace(
        piece,
        key=key,
        data=flat.view(size),
        dtype=flat.dtype,
        local_shape=size,
        global_offset=tuple(a + b for a, b in zip(piece.global_offset, (0,) * stacked + offset, strict=True)),
        axis_fragmentations=None,
        prepend_axis_num=0,
        # Data-parallel ranks hold different blocks; copies over tp and pp stay copies.
        replica_id=(*piece.replica_id[:-1], 0),
    )


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts steps per parameter, that of ``offload``, Transformer Engine's and Apex's per group."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))

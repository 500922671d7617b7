"""Stage 2 alone: the variable all-to-all of this project, and the gathering of all visual tokens on all ranks that others do.

``part`` is forward plus backward. The gather pads every rank to the most tokens, as equal-sized collectives need; its backward
pass sums the gradient of the whole and cuts out the own part, as Megatron-Bridge does.

Settings: ``frames``, ``tokens_per_frame``, ``hidden``.

Legend: N visual tokens made here, M visual tokens owned here, H hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.predicted import reshard_alone
from benchmarks.worker import measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.parallel.reshard import Reshard
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.tokens import plan_reshard

VARIANT = {"tp": 1, "ulysses": 1, "ring": 1, "method": ("all_to_all", "full_gather")}


def rows(settings: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """That of the variant ``text``."""
    variant = parse_variant(text, VARIANT)
    sizes = {axis: variant[axis] for axis in ("tp", "ulysses", "ring")}
    frames, each, hidden = (settings[name] for name in ("frames", "tokens_per_frame", "hidden"))
    topology = ParallelTopology.create(ParallelConfig(**sizes))
    length, moves, made_NH, downed_MH = prepare(topology, frames, each, hidden)
    move = moves[variant["method"]]
    found = measure(lambda: torch.autograd.grad(move(made_NH), made_NH, downed_MH), settings["warmup"], settings["timed"])
    topology.destroy()
    row = {
        "model": f"{frames} frames of {each} tokens, hidden {hidden}",
        "part": "both",
        **sizes,
        "seq_len": length,
        "frames": frames,
        "frames_per_s_per_gpu": round(frames / found.seconds / dist.get_world_size(), 1),
        **found.columns(predicted_bytes(settings, variant, length, made_NH.element_size())),
    }
    return [row]


def predicted_bytes(settings: dict[str, Any], variant: dict[str, Any], length: int, element: int) -> int:
    """Of the fullest rank, in a row of ``length`` tokens."""
    ranks, each = variant["tp"] * variant["ulysses"] * variant["ring"], settings["hidden"] * element
    made = -(-settings["frames"] // ranks) * settings["tokens_per_frame"] * each
    owned = min(length // ranks, settings["frames"] * settings["tokens_per_frame"]) * each
    return reshard_alone(made, owned, ranks * made if variant["method"] == "full_gather" else 0)


def prepare(topology: ParallelTopology, frames: int, each: int, hidden: int):
    """Tokens of the row, the two methods, the tokens made here and the gradient of those owned here."""
    grid, device = topology.grid, accelerator.device()
    unit = math.lcm(grid.document_multiple, grid.row_multiple)
    length = -(-frames * each // unit) * unit
    cu_seqlens = np.array([0, length])
    plan = plan_reshard(cu_seqlens, each * np.arange(frames), [each] * frames, [1] * frames, grid.cp, grid.tp)
    reshard = Reshard.of(plan.of_rank(topology.grid.encoder_rank(topology.rank)), topology.tp_cp, device)
    dtype = accelerator.dtype_of("auto")
    made_NH = torch.randn(sum(reshard.plan.send_counts), hidden, device=device, dtype=dtype).requires_grad_()
    downed_MH = torch.randn(sum(reshard.plan.recv_counts), hidden, device=device, dtype=dtype)
    made = plan.traffic.sum(axis=1).tolist()
    wanted = _places_of_owned(plan, topology.grid.encoder_rank(topology.rank), grid.encoders, max(made)).to(device)

    def full_gather(x_NH):
        return _FullGather.apply(x_NH, made, topology.tp_cp).index_select(0, wanted)

    return length, {"all_to_all": reshard, "full_gather": full_gather}, made_NH, downed_MH


def _places_of_owned(plan, rank: int, ranks: int, padded: int) -> torch.Tensor:
    """Where the tokens that ``rank`` owns stand in the gathered buffer, in the order in which it would receive them."""
    places = []
    for source in range(ranks):
        sent = plan.of_rank(source)
        first = sum(sent.send_counts[:rank])
        places.append(source * padded + sent.send_order[first : first + sent.send_counts[rank]])
    return torch.from_numpy(np.concatenate(places))


class _FullGather(torch.autograd.Function):
    """Every rank's tokens on every rank: [N, H] to [ranks * most N, H]."""

    @staticmethod
    def forward(ctx, x_NH, made, group):
        ctx.made, ctx.group = made, group
        padded = x_NH.new_zeros(max(made), x_NH.shape[1])
        padded[: len(x_NH)] = x_NH
        out = x_NH.new_empty(len(made) * max(made), x_NH.shape[1])
        dist.all_gather_into_tensor(out, padded, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        first = ctx.group.rank() * max(ctx.made)
        return grad[first : first + ctx.made[ctx.group.rank()]], None, None

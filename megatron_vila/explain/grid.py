"""The process grid, the model on it and the tokens of a full row, as tables."""

from __future__ import annotations

from rich.console import Console

from megatron_vila.config.schema import Config
from megatron_vila.explain.text import count, number, ranges, rank_list, table
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.hardware import Machine
from megatron_vila.plan.memory import describe_memory
from megatron_vila.plan.pictures import in_units, most_frames, pictures_of, tokens_each
from megatron_vila.plan.sizes import head_dim, parameter_count
from megatron_vila.plan.traffic import head_split

KINDS = {
    "tp": "weights, heads, slices of tokens",
    "ulysses": "heads of one ring part",
    "ring": "keys and values",
    "cp": "the tokens of one row (MM-SP)",
    "tp_cp": "the frames of one row",
    "dp": "nothing: different rows",
    "dp_cp": "gradients, optimizer state",
    "pp": "the layers",
    "block": "one row, all layers",
}
"""What the ranks of each kind of group share."""


def explain_grid(out: Console, config: Config, grid: GridShape) -> None:
    """Print sizes, groups and the links they use."""
    gpus = config.parallel.gpus_per_node
    nodes = -(-grid.world_size // gpus)
    where = f"{count(nodes, 'node')} of {gpus}" if nodes > 1 else "one node"
    out.print(f"{config.model.name} on {count(grid.world_size, 'rank')} ({where})", style="bold")
    out.print(f"rank = t + {grid.tp}*(u + {grid.ulysses}*(r + {grid.ring}*(d + {grid.dp}*p)))\n")
    rows = [
        ["tp", "t", grid.tp, 1, "weights, heads and (Megatron sequence parallelism) tokens"],
        ["ulysses", "u", grid.ulysses, grid.tp, "tokens; heads during attention (all-to-all)"],
        ["ring", "r", grid.ring, grid.tp * grid.ulysses, "tokens; keys and values go round during attention"],
        ["dp", "d", grid.dp, grid.encoders, "rows of the batch: the size that follows from the others"],
        ["pp", "p", grid.pp, grid.encoders * grid.dp, "layers; the vision tower is on the first stage"],
    ]
    table(out, "Grid", ["axis", "index", "size", "stride", "what it splits"], rows)
    out.print(
        f"cp = ulysses * ring = {grid.cp}; a row is spread over tp * cp = {count(grid.encoders, 'rank')} of each of "
        f"{count(grid.pp, 'pipeline stage')}.\n"
    )
    _groups(out, grid, gpus)
    batch = config.train.global_batch_size
    out.print(
        f"One step: {count(batch, 'row')} = {count(grid.dp, 'data-parallel replica')} x "
        f"{count(batch // grid.dp, 'micro-batch')} of one row.\n"
    )


def _groups(out: Console, grid: GridShape, gpus: int) -> None:
    rows = []
    for kind, shares in KINDS.items():
        groups = grid.groups(kind)
        crossing = sum(len({rank // gpus for rank in group}) > 1 for group in groups)
        link = "inside a node" if not crossing else "crosses nodes"
        if 0 < crossing < len(groups):
            link = f"{crossing} of {len(groups)} cross nodes"
        if len(groups[0]) == 1:
            link = "-"
        example = rank_list(groups[0]) if len(groups) == 1 else f"{rank_list(groups[0])}; {rank_list(groups[1])}"
        if len(example) > 28:
            example = rank_list(groups[0])
        rows.append([kind, len(groups), len(groups[0]), example, link, shares])
    table(
        out,
        "Groups (ranks that share something)",
        ["kind", "groups", "ranks each", "examples", "network", "share"],
        rows,
    )


def explain_model(out: Console, config: Config, grid: GridShape, machine: Machine) -> None:
    """Print what of the model lives where, and an estimate of the memory of a rank on ``machine``."""
    llm, counts = config.model.llm, parameter_count(config.model)
    per_stage = llm.num_layers // grid.pp
    stage_ranks = grid.world_size // grid.pp
    rows = []
    for p in range(grid.pp):
        extra = ["vision tower, projector, token embedding"] if p == 0 else []
        extra += ["final norm, output layer and loss"] if p == grid.pp - 1 else []
        ranks = ranges(range(p * stage_ranks, (p + 1) * stage_ranks))
        rows.append([p, ranks, ranges(range(p * per_stage, (p + 1) * per_stage)), "; ".join(extra)])
    table(out, "Pipeline stages", ["stage", "ranks", "decoder layers", "and"], rows)
    _heads(out, config, grid)
    millions = ", ".join(f"{name} {parameters / 1e6:,.1f} M" for name, parameters in counts.items())
    out.print(f"Parameters: {millions}.")
    out.print(describe_memory(config, grid.world_size, machine) + "\n")


def _heads(out: Console, config: Config, grid: GridShape) -> None:
    llm, split = config.model.llm, head_split(grid, config.model.llm)
    rows = []
    for u in range(grid.ulysses):
        first, kv = u * split.per_rank, split.kv_range(u)
        rows.append([u, ranges(range(first, first + split.per_rank)), split.per_rank, ranges(kv), len(kv)])
    columns = ["ulysses index", "query heads of its tp rank", "count", "key/value heads", "count"]
    table(out, "Attention heads of a rank", columns, rows)
    notes = [f"{llm.num_heads} query and {llm.num_kv_heads} key/value heads of {head_dim(llm)}"]
    notes.append(f"{split.heads} and {split.kv_heads} on each tp rank")
    if llm.num_kv_heads < grid.tp:
        notes.append(f"each key/value head stands on {grid.tp // llm.num_kv_heads} tp ranks (Megatron-Core)")
    sent = sum(len(split.kv_range(u)) for u in range(grid.ulysses))
    if sent > split.kv_heads:
        notes.append(
            f"Ulysses replicates: {split.kv_heads} key/value heads become {sent} in a group, gradients are summed"
        )
    elif grid.ulysses > 1:
        notes.append("Ulysses splits the key/value heads, none is replicated")
    out.print("; ".join(notes) + ".\n")


def explain_tokens(out: Console, config: Config, grid: GridShape) -> None:
    """Print the share of a full row."""
    seq, split = config.train.seq_length, head_split(grid, config.model.llm)
    padded = -(-seq // grid.row_multiple) * grid.row_multiple
    pictures, separators = pictures_of(config.model), len(config.data.frame_separator_ids)
    frames = most_frames(pictures, seq, separators)
    units = pictures.units(max(frames, 1), True)
    rows = [
        [
            "row (train.seq_length)",
            number(seq),
            f"about {frames} {in_units(units)} of {tokens_each(units, separators)} tokens, separators included",
        ],
        ["padded row", number(padded), f"to a multiple of 2*cp*tp = {grid.row_multiple}"],
        [
            "zigzag chunk",
            number(padded // (2 * grid.cp)),
            f"cp rank c holds chunks c and {2 * grid.cp - 1}-c of {2 * grid.cp}",
        ],
        ["cp rank", number(padded // grid.cp), "queries, keys and values before the Ulysses all-to-all"],
        [
            "in attention",
            number(padded // grid.ring),
            f"tokens of a ring part; a rank has {split.per_rank} heads of them",
        ],
        ["rank", number(padded // grid.encoders), "norms, MLP, residual stream (S/(cp*tp))"],
    ]
    table(out, "Tokens of a full row", ["share", "tokens", "note"], rows)

"""What a training step sends over each link, and the least time that takes, as a table: a prediction on a known machine."""

from __future__ import annotations

from rich.console import Console

from megatron_vila.config.schema import Config
from megatron_vila.explain.sample import made_up_document
from megatron_vila.explain.text import count, duration, number, size, table
from megatron_vila.plan.hardware import PRESETS, Machine
from megatron_vila.plan.pictures import most_frames, pictures_of, places
from megatron_vila.plan.row import Document
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.step_traffic import step_flop_seconds, step_traffic


def full_document(config: Config) -> Document:
    """A video with as many frames as ``train.seq_length`` holds, and text in what is left."""
    seq, pictures, separators = config.train.seq_length, pictures_of(config.model), len(config.data.frame_separator_ids)
    frames = most_frames(pictures, seq, separators)
    return made_up_document(config, frames, seq - places(pictures.units(frames, True), separators))


def explain_step(out: Console, config: Config, plan: RowPlan, machine: Machine) -> None:
    """Print the predicted traffic of a step whose rows are all like that of ``plan``."""
    if not (machine.nvlink and machine.network and machine.peak_flops):
        known = ", ".join(PRESETS)
        out.print(f"Times of a step's traffic are predicted for a machine whose links are known: --gpu {known}.\n")
        return
    told, computing = step_traffic(config, plan, machine), step_flop_seconds(config, plan, machine.peak_flops)
    rows = [
        [each.name, *(size(round(n)) if n else "-" for n in (each.nvlink, each.network)), duration(each.seconds)]
        + [f"{100 * each.seconds / computing:.1f} %"]
        for each in told
    ]
    columns = ["traffic", "over NVLink,\nbusiest rank", "over the network,\nbusiest rank", "least time", "of FLOP time"]
    if rows:
        table(out, f"Traffic of one step, predicted for {machine.name}", columns, rows)
    batch, tokens, frames = config.train.global_batch_size, plan.row.lengths[0], sum(u.frames for u in plan.row.units)
    out.print(
        f"A prediction, nothing is measured. One step: {count(batch, 'row')} of {number(tokens)} tokens with "
        f"{count(frames, 'frame')} each. FLOP time: {duration(computing)}, its model FLOPs at the peak of "
        f"{count(plan.grid.world_size, 'GPU')} ({machine.peak_flops / 1e12:g} TFLOP/s each)."
    )
    if rows:
        joined = machine.joined_ranks(config.parallel.gpus_per_node)
        out.print(
            f"Assumed: NVLink moves {machine.nvlink / 1e9:g} GB/s and the network {machine.network / 1e9:g} GB/s for each GPU in "
            f"each direction, NVLink joins {joined} ranks, exchanges follow each other and nothing hides under computation. Real "
            "exchanges are slower, and those of the ring and of the gradients are partly hidden."
        )
    out.print()

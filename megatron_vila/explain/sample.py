"""One sample on the grid: where each frame is encoded, where each token lands, what travels.

A sample comes from ``data.train`` or is made up from a number of frames and text tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sized
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from megatron_vila.config.schema import Config
from megatron_vila.data.media import name_of
from megatron_vila.errors import ConfigError
from megatron_vila.explain.text import count, number, ranges, size, table
from megatron_vila.plan import traffic
from megatron_vila.plan.memory import element_bytes
from megatron_vila.plan.pictures import pictures_of, places, tokens_each
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, Row, references
from megatron_vila.plan.row_plan import RowPlan

if TYPE_CHECKING:
    from megatron_vila.data.dataset import Sample

SETS = ("train", "eval")

LISTED_RANKS = 16
"""Ranks of a table, half of them from its start and half from its end, unless all are asked for."""


def made_up_document(config: Config, frames: int, text: int) -> Document:
    """A video of ``frames`` frames in the middle of ``text`` text tokens (a sixteenth of them before it, as a prompt has). Either
    may be 0."""
    units, separators = pictures_of(config.model).units(frames, True), config.data.frame_separator_ids
    before = text // 16
    blocks = [np.array([MEDIA_TOKEN] * unit.tokens + separators, dtype=np.int64) for unit in units]
    ids = np.concatenate([np.zeros(before, np.int64), *blocks, np.zeros(text - before, np.int64)])
    refs = references("video", range(frames), True, units)
    starts = before + np.cumsum([0, *map(len, blocks)], dtype=np.int64)[:-1]
    name = f"made up: {count(frames, 'frame')}, {count(text, 'text token')}"
    return Document(ids, np.full(len(ids), IGNORE, np.int64), refs, starts, name)


def require_sample(samples: Sized, index: int, asked: str, name: str) -> None:
    """Raise ``ConfigError`` if ``samples`` of data.``name`` have no number ``index``, for which the command line ``asked``."""
    if index >= len(samples):
        raise ConfigError(f"command line: {asked} is not in data.{name}, which has samples 0 to {len(samples) - 1}")


def parse_sample(text: str, asked: str, config: Config) -> tuple[str, int]:
    """``7`` or ``eval:7``: the set's name (train or eval) and the number of a sample. Raises ``ConfigError`` that names what the
    command line ``asked``, also for a set that is empty."""
    name, colon, index = text.rpartition(":")
    name = name if colon else "train"
    if name not in SETS or not index.isdecimal() or len(index) > 18:
        raise ConfigError(
            f"command line: {asked} must be the number of a sample of data.train, e.g. 7, or of data.eval, e.g. eval:7"
        )
    if not getattr(config.data, name):
        raise ConfigError(f"command line: {asked}, but data.{name} is empty")
    return name, int(index)


def left_out(sample: Sample, seq_length: int) -> list[str]:
    """What was done to make a sample fit ``seq_length`` tokens, in words; empty if nothing was."""
    frames = sample.dropped_frames
    return [f"{frames} frames are left out, evenly, to fit train.seq_length={seq_length}"] if frames else []


def explain_sample(out: Console, config: Config, plan: RowPlan, note: str, all_ranks: bool = False) -> None:
    """Print the frame plan, the token plan and the traffic of a row of one document; ``note`` is shown beside it."""
    row = plan.row
    visual, shown = places(row.units, 0), sum(unit.frames for unit in row.units)
    out.print(
        f"Sample {row.sample_ids[0]}: {number(row.lengths[0])} tokens "
        f"({number(visual)} visual of {count(shown, 'frame')}), {number(row.length)} with padding"
    )
    if note:
        out.print(f"({note})")
    out.print()
    _media(out, row)
    _frames_and_tokens(out, plan, all_ranks)
    _traffic(out, config, plan)


def _media(out: Console, row: Row) -> None:
    rows, first = [], 0
    for (source, is_video), run in itertools.groupby(row.frames, key=lambda frame: (frame.source, frame.is_video)):
        frames = list(run)
        decoded = f"{frames[0].indices[0]} .. {frames[-1].indices[-1]}" if is_video else "the picture"
        tokens = tokens_each([frame.unit for frame in frames])
        rows.append([name_of(source), ranges(range(first, first + len(frames))), decoded, tokens])
        first += len(frames)
    if rows:
        table(out, "Media", ["file", "frames of the row", "decoded", "tokens each"], rows)


def _frames_and_tokens(out: Console, plan: RowPlan, all_ranks: bool) -> None:
    rows, grid, tokens = [], plan.grid, plan.reshard.traffic
    per_rank = plan.row.length // grid.encoders
    ranks, made = traffic.block_ranks(grid), tokens.sum(axis=1)
    hidden = 0 if all_ranks else max(0, len(ranks) - LISTED_RANKS)
    for encoder, rank in enumerate(ranks):
        if hidden and LISTED_RANKS // 2 <= encoder < len(ranks) - LISTED_RANKS // 2:
            continue
        place = grid.coordinates(rank)
        frames, places = plan.reshard.frames(encoder), plan.places(rank)
        stays = int(tokens[encoder, encoder])
        where = f"{place.tp}/{place.ulysses}/{place.ring}"
        rows.append([rank, where, ranges(frames), len(frames), number(made[encoder]), number(stays), ranges(places)])
    if hidden:
        rows.insert(LISTED_RANKS // 2, [".."] * 7)
    columns = [
        "rank",
        "t/u/r",
        "frames encoded",
        "count",
        "visual tokens made",
        "of which stay",
        "row places of its tokens",
    ]
    table(out, "Stage 1: frames, and stage 2: tokens (first replica, first pipeline stage)", columns, rows)
    more = f"; {hidden} ranks not listed (--all-ranks lists them)" if hidden else ""
    out.print(
        f"Each rank holds {number(per_rank)} tokens of the row. Frames are dealt by cost in contiguous ranges{more}.\n"
    )


def _traffic(out: Console, config: Config, plan: RowPlan) -> None:
    llm, grid, row = config.model.llm, plan.grid, plan.row
    element = element_bytes(config.train.precision, on_gpu=True)
    nodes = np.array(traffic.block_ranks(grid)) // config.parallel.gpus_per_node
    exchanges = [("stage-2 re-shard, once a row", *traffic.reshard_bytes(plan.reshard, llm.hidden_size, element))]
    for name, function in (
        ("TP gather and scatter, a layer", traffic.tensor_bytes),
        ("Ulysses all-to-all, a layer", traffic.ulysses_bytes),
        ("ring K/V, a layer", traffic.ring_bytes),
    ):
        exchanges.append((name, *function(grid, llm, row.length, element)))
    rows = []
    for name, forward, backward in exchanges:
        for direction, sent in (("forward", forward), ("backward", backward)):
            links = traffic.Links.of(sent, nodes)
            cells = [size(n) for n in (links.most_sent_by_a_rank, links.inside_nodes, links.between_nodes)]
            rows.append([name if direction == "forward" else "", direction, *cells])
    columns = ["exchange", "pass", "most sent\nby a rank", "all, inside\nnodes", "all, between\nnodes"]
    table(out, f"Bytes of one micro-batch in one replica ({element} bytes an element)", columns, rows)
    visual = int(plan.reshard.traffic.sum())
    out.print(f"Stage 2 moves {number(plan.reshard.moved)} of {number(visual)} visual tokens: the lower bound.")
    if config.memory.recompute == "full":
        out.print("memory.recompute=full runs the forward exchanges of each layer once more in the backward pass.")
    elif config.memory.recompute == "attention_output":
        out.print(
            "memory.recompute=attention_output sends a layer's q, k, v and output through the Ulysses exchange once more in the "
            "backward pass, and gathers and scatters over TP once more; the ring sends nothing more."
        )
    if grid.pp > 1:
        boundary = row.length // grid.encoders * llm.hidden_size * element
        out.print(f"Between pipeline stages each rank sends {size(boundary)} forward and as much backward.")

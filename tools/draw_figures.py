"""Draw the README's pictures from the project's own pure functions, so that they cannot differ from the code.

Example: python tools/draw_figures.py docs/images

Writes process-grid.png (who shares a group with whom), two-stage-sharding.png (one packed row: frames to encoders, visual
tokens to owners) and data-path.png (from files to the rows of each replica). Legend: S tokens of the row. Lengths in the pictures
are inches.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.plan.frames import frame_owner
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, Row, pack, references
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.tokens import ReshardPlan, local_positions, owners
from tools.figures.canvas import (
    CELL,
    DPI,
    FAINT,
    INK,
    LEFT,
    LINE,
    RANK_COLORS,
    TEXT_TOKEN,
    arrow,
    canvas,
    heading,
    label,
)
from tools.figures.data_path import draw_data_path

GROUP_COLORS = {"tp": "#c2410c", "ulysses": "#1d4ed8", "ring": "#047857", "dp": "#7e22ce"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure, picture = draw(), io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(picture, dpi=DPI, facecolor="white")
        # A palette is enough for flat colors and makes the files small.
        Image.open(picture).convert("RGB").quantize(96).save(out / f"{name}.png", optimize=True)
        print(out / f"{name}.png")


# ---------------------------------------------------------------------------------------------------------------------
# the process grid

CELL_W, CELL_H, NODE_GAP_X, NODE_GAP_Y = 0.86, 0.6, 0.85, 0.75
SHARES = {
    "tp": "weights, heads, slices of tokens: all-gather, reduce-scatter",
    "ulysses": "tokens for heads: all-to-all inside the node",
    "ring": "keys and values: point to point, across nodes",
    "dp": "different rows; gradients are summed over dp and cp",
}


def draw_process_grid() -> Figure:
    """32 ranks on four nodes of eight: tp=2, ulysses=4, ring=2, dp=2; the groups of rank 0."""
    grid = GridShape.of(32, tp=2, ulysses=4, ring=2)
    sizes = f"tp {grid.tp} × ulysses {grid.ulysses} × ring {grid.ring} × dp {grid.dp}"
    figure, axes = canvas(5.6, f"{grid.world_size} ranks = {sizes}, and the groups of rank 0")
    for rank in range(grid.world_size):
        x, y = _center(grid, rank)
        _box(axes, x, y, 0, facecolor="#f5f7fa", edgecolor=LINE, linewidth=1)
        label(axes, x, y, str(rank), size=11, align="center")
    for dp in range(grid.dp):
        block = grid.group("block", grid.rank(dp=dp))
        y = np.mean([_center(grid, rank)[1] for rank in block])
        label(axes, 0.03, y, f"replica {dp}", size=10.5, align="center", bold=True, rotation=90)
        label(axes, 0.25, y, f"{len(block)} ranks, one row", FAINT, align="center", rotation=90)
        for ring in range(grid.ring):
            _draw_node(axes, grid, [rank for rank in block if grid.coordinates(rank).ring == ring])
    _draw_groups_of_rank_0(axes, grid)
    for number, (kind, what) in enumerate(SHARES.items()):
        y = 0.86 - number * 0.26
        axes.plot([0.75, 1.08], [y, y], color=GROUP_COLORS[kind], linewidth=3)
        label(axes, 1.2, y, kind, GROUP_COLORS[kind], size=10, bold=True)
        label(axes, 2.05, y, f"ranks {', '.join(map(str, grid.group(kind, 0)))}", size=10)
        label(axes, 3.65, y, what, FAINT, size=10)
    return figure


def _center(grid: GridShape, rank: int) -> tuple[float, float]:
    """A node is tp rows of ulysses columns; nodes of one ring stand side by side, replicas below each other."""
    place = grid.coordinates(rank)
    x = 1.2 + place.ring * (grid.ulysses * CELL_W + NODE_GAP_X) + place.ulysses * CELL_W
    y = 4.2 - place.dp * (grid.tp * CELL_H + NODE_GAP_Y) - place.tp * CELL_H
    return x, y


def _draw_node(axes: Axes, grid: GridShape, ranks: list[int]) -> None:
    xs, ys = zip(*(_center(grid, rank) for rank in ranks), strict=True)
    left, bottom = min(xs) - CELL_W * 0.62, min(ys) - CELL_H * 0.68
    width, height = max(xs) - min(xs) + CELL_W * 1.24, max(ys) - min(ys) + CELL_H * 1.36
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": "none", "edgecolor": FAINT, "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, **style))
    label(axes, left + 0.06, bottom + height + 0.14, f"node {ranks[0] // len(ranks)}", FAINT)


def _draw_groups_of_rank_0(axes: Axes, grid: GridShape) -> None:
    centers = {kind: [_center(grid, rank) for rank in grid.group(kind, 0)] for kind in GROUP_COLORS}
    x, y = _center(grid, 0)
    _box(axes, x, y, 0, facecolor="#fde68a", edgecolor=INK, linewidth=1.4, zorder=3)
    label(axes, x, y, "0", size=11, align="center", bold=True, zorder=4)
    for kind, grow in (("ulysses", 0.02), ("tp", 0.09)):
        xs, ys = zip(*centers[kind], strict=True)
        middle = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
        style = {"facecolor": "none", "edgecolor": GROUP_COLORS[kind], "linewidth": 2.6, "zorder": 5}
        _box(axes, *middle, grow, max(xs) - min(xs), max(ys) - min(ys), **style)
    for kind, bend in (("ring", -0.12), ("dp", 0.2)):
        (xa, ya), (xb, yb) = centers[kind]
        start, end = ((xa, ya + 0.26), (xb, yb + 0.26)) if kind == "ring" else ((xa - 0.4, ya), (xb - 0.36, yb))
        arrow(
            axes,
            start,
            end,
            GROUP_COLORS[kind],
            "<|-|>",
            head=13,
            width=2.4,
            connectionstyle=f"arc3,rad={bend}",
            zorder=6,
        )


def _box(axes: Axes, x: float, y: float, grow: float, width: float = 0.0, height: float = 0.0, **style) -> None:
    """A rounded box around cells whose centers span ``width`` and ``height`` around (x, y)."""
    width, height = width + CELL_W * 0.86 + grow, height + CELL_H * 0.8 + grow
    corner = x - width / 2, y - height / 2
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.06", **style))


# ---------------------------------------------------------------------------------------------------------------------
# two-stage sharding

ROW_Y, FRAME_Y = 3.32, 4.28
STRIP_Y, STRIP_STEP = 1.68, 0.42
VIDEOS = ("video A", "video B")


def draw_two_stage_sharding() -> Figure:
    """One packed row of two videos over four ranks (ulysses 2 x ring 2): frames, the row, and what each rank ends up with."""
    grid = GridShape.of(4, ulysses=2, ring=2)
    row = pack(
        [_document(VIDEOS[0], 3, 9, 9), _document(VIDEOS[1], 2, 4, 5)], grid.document_multiple, grid.row_multiple
    )
    plan = RowPlan.of(row, grid).reshard
    maker_S = np.full(row.length, -1)
    maker_S[row.token_ids == MEDIA_TOKEN] = plan.maker
    title = f"One packed row of {row.length} tokens, {len(row.frames)} frames, on {grid.encoders} ranks (ulysses 2 × ring 2)"
    figure, axes = canvas(5.9, title)
    unit = 7.95 / row.length
    _draw_frames(axes, row, plan, unit)
    _draw_row(axes, grid, row, maker_S, unit)
    _draw_owners(axes, grid, row, plan, maker_S, unit * 1.6)
    return figure


def _document(name: str, before: int, frames: int, after: int, tokens: int = 4) -> Document:
    """``frames`` frames of ``tokens`` tokens between ``before`` and ``after`` tokens of text."""
    ids = np.array([0] * before + [MEDIA_TOKEN] * (frames * tokens) + [0] * after, dtype=np.int64)
    refs = references(name, range(frames), True, [Unit(frames=1, tiles=1, tokens=tokens, cost=1)] * frames)
    starts = before + tokens * np.arange(frames, dtype=np.int64)
    return Document(ids, np.full(len(ids), IGNORE, dtype=np.int64), refs, starts, name)


def _draw_frames(axes: Axes, row: Row, plan: ReshardPlan, unit: float) -> None:
    """Pictures above their places in the row, colored by the rank that encodes them."""
    what = "each rank decodes, encodes and projects a contiguous range of frames of equal cost"
    heading(axes, FRAME_Y + 0.86, "Stage 1", what)
    encoder = frame_owner(plan.boundaries)
    centers = LEFT + (row.frame_starts + row.frames[0].tokens / 2) * unit
    size = row.frames[0].tokens * unit * 0.84
    for index, (x, rank) in enumerate(zip(centers, encoder, strict=True)):
        color = RANK_COLORS[rank]
        axes.add_patch(Rectangle((x - size / 2, FRAME_Y), size, size, facecolor=color))
        label(axes, x, FRAME_Y + size / 2, str(index), "white", align="center", bold=True)
        arrow(axes, (x, FRAME_Y - 0.03), (x, ROW_Y + CELL + 0.27), color, "-|>", head=8, width=1.3)
    documents = np.searchsorted(row.cu_seqlens, row.frame_starts, side="right")
    for rank, document in sorted(set(zip(encoder.tolist(), documents.tolist(), strict=True))):
        middle = centers[(encoder == rank) & (documents == document)].mean()
        label(axes, middle, FRAME_Y + 0.5, f"rank {rank}", RANK_COLORS[rank], align="center", bold=True)


def _draw_row(axes: Axes, grid: GridShape, row: Row, maker_S: np.ndarray, unit: float) -> None:
    """The packed row: tokens colored by their maker, zigzag chunks framed in the color of their owner."""
    for place in range(row.length):
        _token(axes, LEFT + place * unit, ROW_Y, unit, CELL, maker=maker_S[place], padding=_is_padding(row, place))
    for start, stop, name in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], VIDEOS, strict=True):
        size = (stop - start) * unit, CELL
        axes.add_patch(
            Rectangle((LEFT + start * unit, ROW_Y), *size, fill=False, edgecolor=INK, linewidth=1.4, zorder=5)
        )
        middle = LEFT + (start + stop) / 2 * unit
        label(axes, middle, ROW_Y + CELL + 0.13, f"{name}: one document, {stop - start} tokens", align="center")
    label(axes, LEFT - 0.08, ROW_Y + CELL / 2, "packed row", align="right")
    label(axes, LEFT - 0.08, ROW_Y - 0.17, "owner", align="right")
    for first, size in _chunks(row, grid):
        rank = int(owners(row.cu_seqlens, grid.cp, grid.tp, np.array([first]))[0][0])
        x, width, color = LEFT + first * unit, size * unit, RANK_COLORS[rank]
        corner = x + 0.012, ROW_Y - 0.28
        axes.add_patch(Rectangle(corner, width - 0.024, 0.22, facecolor="white", edgecolor=color, linewidth=1.6))
        label(axes, x + width / 2, ROW_Y - 0.175, str(rank), color, size=9, align="center", bold=True)
    y = ROW_Y - 0.5
    what = "fill: rank that made the token     frame: rank that owns its place (zigzag chunks of each document)"
    label(axes, LEFT, y, what, FAINT)
    for x, name, padding in ((LEFT + 6.45, "text", False), (LEFT + 7.15, "padding", True)):
        _token(axes, x, y - 0.08, 0.16, 0.16, maker=-1, padding=padding)
        label(axes, x + 0.22, y, name, FAINT)


def _draw_owners(axes: Axes, grid: GridShape, row: Row, plan: ReshardPlan, maker_S: np.ndarray, unit: float) -> None:
    """What each rank holds in the LLM, in its local order."""
    what = "one all-to-all sends each visual token straight to the rank that owns its place"
    heading(axes, STRIP_Y + 0.6, "Stage 2", what)
    for rank, color in enumerate(RANK_COLORS):
        positions = local_positions(row.cu_seqlens, grid.cp, rank)
        y, end = STRIP_Y - rank * STRIP_STEP, len(positions) * unit
        for slot, place in enumerate(positions):
            _token(axes, LEFT + slot * unit, y, unit, CELL, maker=maker_S[place], padding=_is_padding(row, int(place)))
        axes.add_patch(Rectangle((LEFT, y), end, CELL, fill=False, edgecolor=color, linewidth=2, zorder=5))
        for slot in np.flatnonzero(np.isin(positions, [first for first, _ in _chunks(row, grid)])):
            x = LEFT + slot * unit
            axes.plot([x, x], [y, y + CELL], color=color, linewidth=2.4, solid_capstyle="butt", zorder=5)
        owned, own = int(plan.traffic[:, rank].sum()), int(plan.traffic[rank, rank])
        label(axes, LEFT - 0.08, y + CELL / 2, f"rank {rank}", color, size=10, align="right", bold=True)
        result = f"{len(positions)} tokens, {owned} visual: {own} made here, {owned - own} received"
        label(axes, LEFT + end + 0.12, y + CELL / 2, result)
    moved = f"{plan.moved} of {int(plan.traffic.sum())} visual tokens change rank."
    label(axes, LEFT, -0.02, f"{moved} Each travels once; no rank holds the embeddings of the whole row.", size=10)


def _token(axes: Axes, x: float, y: float, width: float, height: float, maker: int, padding: bool) -> None:
    """One token: the color of its maker, gray for text (-1), hatched for padding."""
    color = RANK_COLORS[maker] if maker >= 0 else "white" if padding else TEXT_TOKEN
    style = {"facecolor": color, "edgecolor": LINE if maker < 0 else "white", "hatch": "/////" if padding else None}
    axes.add_patch(Rectangle((x, y), width, height, linewidth=0.7, **style))


def _is_padding(row: Row, place: int) -> bool:
    document = int(np.searchsorted(row.cu_seqlens, place, side="right")) - 1
    return place - int(row.cu_seqlens[document]) >= row.lengths[document]


def _chunks(row: Row, grid: GridShape) -> list[tuple[int, int]]:
    """First place and size of each zigzag chunk of each document."""
    chunks = []
    for start, stop in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
        size = (stop - start) // (2 * grid.cp)
        chunks += [(start + index * size, size) for index in range(2 * grid.cp)]
    return chunks


PICTURES = {
    "process-grid": draw_process_grid,
    "two-stage-sharding": draw_two_stage_sharding,
    "data-path": draw_data_path,
}

if __name__ == "__main__":
    main()

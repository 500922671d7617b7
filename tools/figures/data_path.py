"""From files to the rows of each replica, by the functions that order, pack and deal samples. Lengths are inches."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from megatron_vila.data.order import SampleOrder
from megatron_vila.plan.dealing import deal_rows
from megatron_vila.plan.packing import pack_samples
from tools.figures.canvas import CELL, FAINT, INK, LEFT, LINE, RANK_COLORS, arrow, canvas, heading, label

KINDS = ("images", "videos", "text")
KIND_COLORS = ("#0f9d76", "#2563eb", "#ea8a0b")
SET_SIZES, WEIGHTS, TOKENS = (7, 9, 5), (0.3, 0.5, 0.2), ((2, 3), (5, 13), (3, 5))
BROKEN = 5
"""the instance that cannot be used"""
PATH_ROWS, ROW_ROOM, REPLICAS = 4, 16, 2
PLACE, TOKEN = 0.3, 0.155


def draw_data_path() -> Figure:
    """Files, the order of samples, the rows that are packed from the look-ahead, and who trains on them."""
    order = SampleOrder(SET_SIZES, seed=2, shuffle=True, weights=WEIGHTS)
    count = 24
    sources, _ = order.locate(0, count)
    numbers = order.records(0, count) - np.cumsum([0, *SET_SIZES])[sources]
    tokens = [
        TOKENS[source][0] + int(n) * 3 % (TOKENS[source][1] - TOKENS[source][0] + 1)
        for source, n in zip(sources, numbers, strict=True)
    ]
    usable = [n for n in range(count) if n != BROKEN]
    rows = pack_samples([tokens[n] for n in usable], [0] * len(usable), PATH_ROWS, ROW_ROOM, 1)
    rows = [[usable[place] for place in row] for row in rows]
    figure, axes = canvas(6.75, f"From files to rows: a step of {PATH_ROWS} rows on {REPLICAS} replicas")
    _draw_files(axes)
    _draw_order(axes, sources, numbers, tokens)
    _draw_rows(axes, sources, numbers, tokens, rows)
    return figure


def _draw_files(axes: Axes) -> None:
    heading(
        axes, 6.0, "Files", "JSON, JSONL, parquet, folders, tar files of others; best prepared once, on many machines"
    )
    boxes = (
        (LEFT, 1.8, "any public set", "messages, captions, clips"),
        (LEFT + 2.6, 2.0, "tools/prepare_data.py", "small frames, all key frames"),
        (LEFT + 5.4, 2.0, "shards with an index", "tar files; local or s3://"),
    )
    for x, width, name, what in boxes:
        style = {
            "boxstyle": "round,pad=0,rounding_size=0.06",
            "facecolor": "#f5f7fa",
            "edgecolor": FAINT,
            "linewidth": 1.2,
        }
        axes.add_patch(FancyBboxPatch((x, 5.2), width, 0.52, **style))
        label(axes, x + width / 2, 5.56, name, align="center", bold=True)
        label(axes, x + width / 2, 5.35, what, FAINT, size=8.5, align="center")
    for (x, width, *_), (after, *_) in zip(boxes[:-1], boxes[1:], strict=True):
        arrow(axes, (x + width + 0.08, 5.46), (after - 0.08, 5.46), INK, "-|>", 11, 1.5)
    arrow(axes, (LEFT + 0.9, 5.15), (LEFT + 0.9, 4.62), FAINT, "-|>", 10, 1.3, linestyle="--")
    label(axes, LEFT + 1.01, 4.95, "records and tar files also as they are", FAINT)
    arrow(axes, (LEFT + 6.4, 5.15), (LEFT + 6.4, 4.62), INK, "-|>", 11, 1.5)


def _draw_order(axes: Axes, sources: np.ndarray, numbers: np.ndarray, tokens: list[int]) -> None:
    what = "a function of (seed, epoch, index) and of the weights; the same for every number of ranks"
    heading(axes, 4.42, "Order", what)
    for n, (source, number) in enumerate(zip(sources, numbers, strict=True)):
        x, y = LEFT + n * (PLACE + 0.035), 3.8
        style = {"facecolor": "white", "edgecolor": LINE} if n == BROKEN else {"facecolor": KIND_COLORS[source]}
        axes.add_patch(Rectangle((x, y), PLACE, PLACE, linewidth=1, **style))
        label(
            axes,
            x + PLACE / 2,
            y + PLACE / 2,
            str(number),
            FAINT if n == BROKEN else "white",
            align="center",
            bold=True,
        )
        if n == BROKEN:
            axes.plot([x, x + PLACE], [y, y + PLACE], color="#b42318", linewidth=2)
            axes.plot([x, x + PLACE], [y + PLACE, y], color="#b42318", linewidth=2)
            label(axes, x + PLACE / 2, y - 0.12, "left out where it comes", "#b42318", size=9, align="center")
    for place, (kind, color) in enumerate(zip(KINDS, KIND_COLORS, strict=True)):
        x = LEFT + 4.3 + place * 1.25
        axes.add_patch(Rectangle((x, 3.6), 0.15, 0.15, facecolor=color))
        label(axes, x + 0.22, 3.675, f"{kind}, {round(100 * WEIGHTS[place])} %", FAINT)


def _draw_rows(axes: Axes, sources: np.ndarray, numbers: np.ndarray, tokens: list[int], rows: list[list[int]]) -> None:
    what = "the largest that fits, from a bounded look-ahead; what is left waits for the next step"
    heading(axes, 3.2, "Packing", what)
    costs = [sum(tokens[n] ** 2 + 8 * tokens[n] for n in row) for row in rows]
    hands = deal_rows(costs, REPLICAS)
    for place, row in enumerate(rows):
        y = 2.62 - place * 0.42
        label(axes, LEFT - 0.08, y + 0.15, f"row {place}", align="right")
        x = LEFT
        for n in row:
            width = tokens[n] * TOKEN
            axes.add_patch(
                Rectangle((x, y), width, CELL, facecolor=KIND_COLORS[sources[n]], edgecolor="white", linewidth=1.2)
            )
            label(axes, x + width / 2, y + CELL / 2, str(numbers[n]), "white", align="center", bold=True)
            x += width
        end = LEFT + ROW_ROOM * TOKEN
        if x < end - 1e-9:
            axes.add_patch(
                Rectangle((x, y), end - x, CELL, facecolor="white", edgecolor=LINE, hatch="/////", linewidth=0.7)
            )
        hand = next(replica for replica, own in enumerate(hands) if place in own)
        target = LEFT + 4.05, 2.35 - hand * 0.84 + 0.1 * (1 - 2 * hands[hand].index(place))
        arrow(axes, (end + 0.08, y + CELL / 2), target, RANK_COLORS[3 * hand], "-|>", 10, 1.5)
    waiting = [n for n in range(len(tokens)) if n != BROKEN and not any(n in row for row in rows)]
    label(axes, LEFT, 1.12, f"{len(waiting)} samples wait", FAINT)
    for replica, own in enumerate(hands):
        y = 2.35 - replica * 0.84
        color = RANK_COLORS[3 * replica]
        axes.add_patch(
            FancyBboxPatch(
                (LEFT + 4.1, y - 0.3),
                3.9,
                0.6,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor="white",
                edgecolor=color,
                linewidth=1.6,
            )
        )
        share = sum(costs[row] for row in own) / sum(costs)
        label(
            axes,
            LEFT + 4.22,
            y + 0.13,
            f"replica {replica}: rows {' and '.join(map(str, own))}",
            color,
            bold=True,
            size=10,
        )
        label(axes, LEFT + 4.22, y - 0.12, f"{100 * share:.1f} % of the predicted time", FAINT)
        for rank in range(4):
            axes.add_patch(
                Rectangle((LEFT + 6.5 + rank * 0.36, y - 0.14), 0.3, 0.28, facecolor=color, alpha=0.35 + 0.2 * rank)
            )
    label(axes, LEFT + 4.1, 0.97, "each rank of a replica decodes its own frames of the row", INK)
    heading(
        axes,
        0.5,
        "Resume",
        "a checkpoint keeps the next place in the order and what waits; any number of ranks goes on from it",
    )

"""The results of a needle test as a picture: frames from left to right, depth from top to bottom, a cell's score as color and
number. The cells of trained lengths stand in a frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_vila.evaluation.results import CellResult, Results, percent
from megatron_vila.plain_files import replace_file

_INK, _FAINT, _MARK = "#1f2933", "#7b8794", "#1d4ed8"
# Dark red to yellow to green; red and green differ in lightness too, for eyes that do not tell them apart.
_COLORS = LinearSegmentedColormap.from_list("needle", ["#8e1b1b", "#e4573d", "#f7d774", "#a9d48a", "#3f9f5f"])
_CELL_W, _CELL_H = 0.62, 0.5  # inches


def draw_heat_map(results: Results, out_png: Path, title: str) -> None:
    """Draw all cells of ``results``, white where one is missing. Raises ``OSError``."""
    figure = heat_map(results, title)
    replace_file(out_png, lambda temporary: figure.savefig(temporary, format="png"))


def heat_map(results: Results, title: str) -> Figure:
    """The figure of at least one cell."""
    frames = sorted({cell.frames for cell in results.cells.values()})
    depths = sorted({cell.depth for cell in results.cells.values()})
    score_DF = np.full((len(depths), len(frames)), np.nan)
    for (count, depth), cell in results.cells.items():
        score_DF[depths.index(depth), frames.index(count)] = 100 * cell.score
    size = max(6.4, 1.9 + _CELL_W * len(frames)), 1.9 + _CELL_H * len(depths)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.pcolormesh(score_DF, cmap=_COLORS, norm=Normalize(0, 100), edgecolors="white", linewidth=1.5)
    for row, column in np.argwhere(~np.isnan(score_DF)):
        score = score_DF[row, column]
        color = "white" if score < 22 else _INK
        axes.text(column + 0.5, row + 0.5, percent(score / 100), ha="center", va="center", color=color, fontsize=9)
    _label(axes, frames, depths, _tokens(results.cells.values(), frames))
    bar = figure.colorbar(picture, ax=axes, pad=0.015, aspect=30, ticks=[0, 25, 50, 75, 100])
    bar.set_label("needles found, %", color=_INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_INK, labelsize=8, length=0)
    trained = [count for count in frames if results.trained_frames is not None and count <= results.trained_frames]
    if trained:
        box = Rectangle(
            (0, 0), len(trained), len(depths), fill=False, edgecolor=_MARK, linewidth=3, clip_on=False, zorder=5
        )
        axes.add_patch(box)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=24, parse_math=False)
    axes.text(0, 1, _summary(results, bool(trained)), transform=axes.transAxes, color=_INK, fontsize=9, va="bottom")
    axes.texts[-1].set_y(1.025)
    return figure


def _label(axes: Axes, frames: Sequence[int], depths: Sequence[float], tokens: Sequence[int]) -> None:
    axes.invert_yaxis()
    names = [f"{count:,}\n{_short(size)}" for count, size in zip(frames, tokens, strict=True)]
    axes.set_xticks(np.arange(len(frames)) + 0.5, names)
    axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("frames of the video, and tokens of the prompt", color=_INK, fontsize=9)
    axes.set_ylabel("depth of the needle", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    axes.spines[:].set_visible(False)


def _tokens(cells: Collection[CellResult], frames: Sequence[int]) -> list[int]:
    return [max(cell.tokens for cell in cells if cell.frames == count) for count in frames]


def _short(tokens: int) -> str:
    """A number of tokens as on an axis: 931, 12.4K, 1.18M."""
    if tokens >= 999_500:
        return f"{tokens / 10**6:.3g}M"
    return f"{tokens / 10**3:.3g}K" if tokens >= 10**3 else str(tokens)


def _summary(results: Results, marked: bool) -> str:
    all_cells, trained, beyond = (results.mean(kind) for kind in (None, True, False))
    if not marked or trained is None:
        return f"mean {percent(all_cells or 0.0)} %"
    text = f"trained lengths (framed, up to {results.trained_frames:,} frames): {percent(trained)} %"
    return text if beyond is None else f"{text};  beyond: {percent(beyond)} %"

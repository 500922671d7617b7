"""Colors, sizes and text of the pictures. Lengths are inches."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

INK, FAINT, LINE, TEXT_TOKEN = "#1f2933", "#616e7c", "#cbd2d9", "#e4e7eb"
RANK_COLORS = ("#2563eb", "#ea8a0b", "#0f9d76", "#a855c7")
WIDTH, DPI = 9.0, 200
LEFT, CELL = 0.85, 0.3
"""Where the content begins, and the height of a row of tokens."""


def canvas(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 0.94))
    axes.set_xlim(-0.1, WIDTH - 0.1)
    axes.set_ylim(-0.1, height * 0.94 - 0.1)
    axes.axis("off")
    axes.set_title(title, fontsize=12.5, color=INK, loc="left", x=0.012, pad=4, weight="bold")
    return figure, axes


def heading(axes: Axes, y: float, name: str, text: str) -> None:
    label(axes, -0.02, y, name, size=11, bold=True)
    label(axes, LEFT, y, text, size=10)


def label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str = INK,
    size: float = 9.5,
    align: str = "left",
    bold: bool = False,
    **style,
) -> None:
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, fontsize=size, color=color, ha=align, va="center", weight=weight, **style)


def arrow(axes: Axes, start, end, color: str, kind: str, head: float, width: float, **style) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=kind, mutation_scale=head, color=color, linewidth=width, **style)
    )

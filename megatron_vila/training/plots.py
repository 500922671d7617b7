"""Loss curves of one run, or of several runs one after the other (the stages of a recipe), as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_vila.plain_files import replace_file
from megatron_vila.training.summary import read_metrics

_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_LOSS, _LR, _ACCURACY = "#2563eb", "#d97706", "#059669"


def plot_runs(folders: Sequence[str | Path], out_png: str | Path, labels: Sequence[str] | None = None) -> None:
    """Draw the runs in ``folders`` one after the other, each from its ``metrics.jsonl``, into ``out_png``.

    The upper panel has the loss (thin), its running mean (bold) and the learning rate on a second axis; a lower panel has
    the evaluations' accuracy and chance level, if there are any. ``labels`` (default: folder names) stand above the runs if
    there are several. Nothing is drawn while there is no step.
    """
    runs = [read_metrics(folder) for folder in folders]
    if not any(steps for steps, _ in runs):
        return
    names = list(labels) if labels is not None else [Path(f).name for f in folders]
    has_accuracy = any(_has(r, "eval_accuracy") for _, evaluations in runs for r in evaluations)
    figure = Figure(figsize=(9, 6.4 if has_accuracy else 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2 if has_accuracy else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1.4] if has_accuracy else [1]
    )[:, 0]
    for panel in panels:
        _style(panel)
    rate_axis = panels[0].twinx()
    _style(rate_axis)
    rate_axis.grid(False)
    ends = _draw_losses(panels[0], rate_axis, [steps for steps, _ in runs])
    if has_accuracy:
        _draw_accuracy(panels[1], [evaluations for _, evaluations in runs], [0, *ends[:-1]])
    if len(runs) > 1:
        _draw_stages(panels, names, ends)
    panels[-1].set_xlabel("optimizer step")
    panels[0].set_xlim(0, ends[-1] + max(1, ends[-1] * 0.01))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = [line for axis in (panels[0], rate_axis) for line in axis.get_lines() if line.get_label()[0] != "_"]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=3, frameon=False)
    replace_file(Path(out_png), lambda temporary: figure.savefig(temporary, format="png"))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` finite values at each place; NaN before the first finite one. float64 [N] to [N]."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first = np.maximum(0, np.arange(1, len(values) + 1) - window)
    n = counts[1:] - counts[first]
    return np.where(n > 0, (sums[1:] - sums[first]) / np.maximum(n, 1), np.nan)


def _draw_losses(losses: Axes, rates: Axes, runs: list[list[dict[str, Any]]]) -> list[int]:
    """Draw all runs' losses and rates; returns the last step of each run, counted from the first run's start."""
    ends, offset, finite = [], 0, []
    for number, steps in enumerate(runs):
        x = np.array([offset + r["step"] for r in steps], dtype=float)
        y = np.array([np.nan if r["loss"] is None else r["loss"] for r in steps], dtype=float)
        rate = np.array([max(v for k, v in r.items() if k.startswith("lr_")) for r in steps], dtype=float)
        finite.extend(y[np.isfinite(y)])
        window = max(1, len(y) // 30)
        # a name that begins with "_" stays out of the legend
        hidden = "_" if number else ""
        losses.plot(x, y, color=_LOSS, alpha=0.3, linewidth=0.8, label=hidden + "loss")
        losses.plot(x, running_mean(y, window), color=_LOSS, linewidth=1.8, label=hidden + "running mean")
        rates.plot(x, rate, color=_LR, linewidth=1, linestyle=(0, (4, 2)), label=hidden + "learning rate")
        offset += steps[-1]["step"] if steps else 0
        ends.append(offset)
    losses.set_ylabel("loss per supervised token")
    rates.set_ylabel("largest learning rate", color=_LR)
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter("{x:g}")
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        losses.set_yscale("log")
    elif finite and min(finite) >= 0:
        losses.set_ylim(bottom=0)
    return ends


def _has(record: dict[str, Any], name: str) -> bool:
    return record.get(name) is not None


def _draw_accuracy(panel: Axes, runs: list[list[dict[str, Any]]], offsets: list[int]) -> None:
    points = [(o + r["step"], r) for o, run in zip(offsets, runs, strict=True) for r in run if _has(r, "eval_accuracy")]
    x = [step for step, _ in points]
    y = [r["eval_accuracy"] for _, r in points]
    panel.plot(x, y, color=_ACCURACY, marker="o", markersize=5, linewidth=1.4, clip_on=False, zorder=3)
    text = f"last: {100 * y[-1]:.1f} %"
    chances = [r["eval_chance"] for _, r in points if _has(r, "eval_chance")]
    if chances:
        panel.axhline(chances[-1], color=_FAINT, linewidth=1, linestyle=":")
        text += f"   chance: {100 * chances[-1]:.1f} %"
    panel.annotate(text, (0.99, 0.24), xycoords="axes fraction", ha="right", color=_ACCURACY, fontsize=9)
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    panel.set_ylabel("held-out accuracy")


def _draw_stages(panels: np.ndarray, names: list[str], ends: list[int]) -> None:
    for start, end, name in zip([0, *ends[:-1]], ends, names, strict=True):
        for panel in panels:
            if start:
                panel.axvline(start, color=_FAINT, linewidth=0.9, linestyle="-", alpha=0.7, zorder=1)
        panels[0].annotate(
            name, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=9, color=_INK,
        )  # fmt: skip


def _style(axes: Axes) -> None:
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9, length=3)

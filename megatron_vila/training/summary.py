"""Totals of a run from its ``metrics.jsonl``, and of several runs that make up a recipe (the stages of the quickstart).

Reading the file, and not counting along, makes the totals of a run that was stopped and resumed the same as of one that
was not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


def read_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step records and the evaluation records of a run's folder, in order; both empty if there is no file yet."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return [], []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r for r in records if "loss" in r], [r for r in records if "loss" not in r]


def summarize(folder: str | Path) -> dict[str, Any]:
    """Totals of a run: steps, tokens, frames, training time, rates, last loss and the last evaluation.

    ``train_s`` is the time in training steps: no start-up, evaluation or checkpoint. ``tokens_per_s`` is over all ranks.
    """
    steps, evaluations = read_metrics(folder)
    if not steps:
        return {"steps": 0, "tokens": 0, "frames": 0, "train_s": 0.0}
    seconds = sum(r["step_s"] for r in steps)
    tokens, frames = sum(r["tokens"] for r in steps), sum(r["frames"] for r in steps)
    summary = {
        "steps": steps[-1]["step"],
        "tokens": tokens,
        "frames": frames,
        "train_s": seconds,
        "tokens_per_s": tokens / seconds,
        "frames_per_s": frames / seconds,
        "mfu": None if steps[-1]["mfu"] is None else sum(r["mfu"] * r["step_s"] for r in steps) / seconds,
        "loss": steps[-1]["loss"],
        "peak_memory_gib": max(r["peak_memory_gib"] for r in steps),
        "skipped": steps[-1]["skipped"],
    }
    return summary | {k: v for r in evaluations[-1:] for k, v in r.items() if k != "step"}


def combine(folders: Sequence[str | Path], wall_s: float) -> dict[str, Any]:
    """Summary of a recipe whose runs stand in ``folders`` in order; results (``held_out_accuracy``, ...) are the last run's.

    ``wall_s`` is the time of the whole recipe. Raises ``FileNotFoundError`` if a run has not written its summary.
    """
    stages = [json.loads((Path(f) / SUMMARY_FILE).read_text(encoding="utf-8")) for f in folders]
    seconds = sum(s["train_s"] for s in stages)
    totals = {key: sum(s[key] for s in stages) for key in ("steps", "tokens", "frames", "train_s")}
    return (
        stages[-1]
        | totals
        | {
            "wall_s": wall_s,
            "tokens_per_s": totals["tokens"] / seconds if seconds else 0.0,
            "frames_per_s": totals["frames"] / seconds if seconds else 0.0,
            "stages": [dict(s, folder=str(f)) for s, f in zip(stages, folders, strict=True)],
        }
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` in one atomic replacement."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def print_summary(summary: Mapping[str, Any], labels: Sequence[str], console: Console) -> None:
    """Print a combined summary: a row per stage, then the held-out accuracy with its chance level."""
    table = Table("stage", *(("steps", "tokens", "frames", "time", "tokens/s", "last loss")), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, stage in zip((*labels, "all"), (*summary["stages"], summary), strict=True):
        loss = "-" if stage is summary or stage.get("loss") is None else f"{stage['loss']:.3f}"
        table.add_row(
            label,
            f"{stage['steps']:,}",
            f"{stage['tokens']:,}",
            f"{stage['frames']:,}",
            f"{stage['train_s']:.0f} s",
            f"{stage.get('tokens_per_s', 0.0):,.0f}",
            loss,
        )
    console.print(table)
    console.print()
    if "held_out_accuracy" in summary:
        console.print(
            f"accuracy on held-out videos: {100 * summary['held_out_accuracy']:.1f} % (chance: {100 * summary['chance']:.1f} %)",
            style="bold",
        )
    console.print(f"wall time: {summary['wall_s']:.0f} s")

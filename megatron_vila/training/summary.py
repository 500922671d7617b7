"""Totals of a run from its ``metrics.jsonl``, and of several runs that make up a recipe (the stages of the quickstart).

Totals are read from the file instead of being counted during the run, so a run that was stopped and resumed has the same totals
as one that was not. Editors, full disks and crashes can damage the file: lines that are not records are left out, and a line of
the log says so.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_vila.errors import UserError
from megatron_vila.plain_files import replace_file

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LONGEST_LINE = 2**20
"""bytes; a line of the trainer has fewer than a thousand"""

_NUMBERS = ("tokens", "frames", "step_s", "peak_memory_gib", "skipped")
_NULLABLE = ("loss", "mfu")
_TOTALS = ("steps", "tokens", "frames", "train_s")


def read_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step records of a run's folder and the results of its tasks (``roles.py``), in order; both empty without a file.

    A record replaces earlier ones of the same and of later steps, which come from a run that was set back. The results of
    several tasks after one step are one record.
    """
    path = Path(folder) / METRICS_FILE
    steps: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for _, record in read_records(path) if path.exists() else ():
        is_step, beside = "loss" in record, {}
        for records in (steps, results) if is_step else (results,):
            while records and records[-1]["step"] >= record["step"]:
                beside = records.pop()
        if is_step:
            steps.append(record)
        else:
            results.append(beside | record if beside.get("step") == record["step"] else record)
    return steps, results


def read_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of a ``metrics.jsonl`` that is a record, and the record. Raises ``OSError`` if there is no file to read.

    A record has a whole number ``step``, nothing but numbers and nulls, and what ``summarize`` and ``plots.py`` need.
    """
    if not path.is_file():
        raise OSError(0, "it is not a regular file", str(path))
    left_out, first = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            record = _record_of(line)
            if record is not None:
                yield line, record
            elif line.strip():
                left_out, first = left_out + 1, first or number
    if left_out:
        lines = "1 line is not a record and is" if left_out == 1 else f"{left_out} lines are no records and are"
        logger.warning("%s: %s left out (the first one is line %d)", path, lines, first)


def _lines(file: Any) -> Iterator[bytes]:
    """Whole lines; of one that is too long only its beginning, without its line break."""
    while line := file.readline(LONGEST_LINE):
        yield line
        while line and len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)


def _record_of(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None  # cut off by a crash
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 2**63:
        return None
    if not all(value is None or _is_number(value) for value in record.values()):
        return None
    if "loss" not in record:
        return record
    rates = [value for name, value in record.items() if name.startswith("lr_")]
    numbers = [*rates, *(record.get(name) for name in _NUMBERS)]
    return record if rates and all(map(_is_number, numbers)) and record.keys() >= set(_NULLABLE) else None


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) < 2**63


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
        "tokens_per_s": tokens / seconds if seconds else 0.0,
        "frames_per_s": frames / seconds if seconds else 0.0,
        "mfu": _mean_mfu(steps),
        "loss": steps[-1]["loss"],
        "peak_memory_gib": max(r["peak_memory_gib"] for r in steps),
        "skipped": steps[-1]["skipped"],
    }
    return summary | {k: v for r in evaluations[-1:] for k, v in r.items() if k != "step"}


def combine(folders: Sequence[str | Path], wall_s: float) -> dict[str, Any]:
    """Summary of a recipe whose runs stand in ``folders`` in order; results (``held_out_accuracy``, ...) are the last run's.

    ``wall_s`` is the time of the whole recipe. Raises ``UserError`` if a run has not written its summary or it cannot be read.
    """
    stages = [_read_summary(Path(folder) / SUMMARY_FILE) for folder in folders]
    seconds = sum(s["train_s"] for s in stages)
    totals = {key: sum(s[key] for s in stages) for key in _TOTALS}
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


def _mean_mfu(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the time of the steps with an MFU. A run that continued without GPUs, or on unknown ones, has steps without."""
    known = [r for r in steps if r["mfu"] is not None]
    seconds = sum(r["step_s"] for r in known)
    return sum(r["mfu"] * r["step_s"] for r in known) / seconds if seconds else None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a plain file", str(path))
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: that run has not finished") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); start the run again to write it") from error
    if not isinstance(summary, dict) or not all(_is_number(summary.get(name)) for name in _TOTALS):
        raise UserError(f"{path} is not a summary of a run (it needs {', '.join(_TOTALS)}); start the run again to write it")
    return summary


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` in one atomic replacement."""
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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

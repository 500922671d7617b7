"""What a run reports: progress line, TensorBoard, ``metrics.jsonl``, loss curve and summary, all from one record per step.

Only the writer rank writes; on the others every call is a no-op, so that the trainer needs no ``if``. No collective is called
here: the trainer hands over numbers that hold for the whole run (loss over the global batch, tokens of all ranks, ...).

Files in the output folder:

* ``metrics.jsonl``: one JSON object per step (it has ``loss``) or evaluation (its keys begin with ``eval_``). Floats are
  written so that they read back bit for bit; a number that is not finite becomes null. After a resume at step k the lines
  after k are dropped first, in one atomic replacement, so that no step stands there twice;
* ``tensorboard/``: the same as scalars; a resume hides the steps after k in the same way;
* ``loss.png`` and ``summary.json``: see ``plots.py`` and ``summary.py``.

None of them can end a run (``report_files.py``).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_vila.busy import LastingConsole
from megatron_vila.plain_files import replace_file
from megatron_vila.plan.flops import mfu
from megatron_vila.training.loading import FRAMES, SECONDS, averaged, limit
from megatron_vila.training.progress import progress_display
from megatron_vila.training.report_files import AppendFile, Reporting
from megatron_vila.training.roles import RunFacts, StepMetrics, TaskName, Watcher
from megatron_vila.training.summary import METRICS_FILE, SUMMARY_FILE, read_records, summarize, write_json

PLOT_FILE = "loss.png"
FIRST_JUDGED = 10
"""Step of a run, counted from its start, from which waiting for data is judged; before it nothing is decoded ahead yet."""


class MetricsLogger(Watcher):
    """Writes the records of a run, from ``start`` to ``close``, which makes the files complete.

    No method raises because of a file or the screen: the failure is logged in one line, and the next record tries again.

    A new run starts ``metrics.jsonl`` afresh. No MFU is shown if the peak of the GPU is unknown. Lines and TensorBoard scalars
    appear every ``log_every`` steps, with rates over the steps since the line before; ``metrics.jsonl`` has every step.
    """

    def __init__(self, output_dir: str | Path, log_every: int = 1, console: Console | None = None) -> None:
        self.folder = Path(output_dir)
        self._log_every, self._console = log_every, console
        self._window: list[StepMetrics] = []
        self._told: set[str] = set()
        self._open = False

    def start(self, facts: RunFacts) -> None:
        """Open the files and drop what they hold of steps after ``facts.start_step``."""
        self._facts, self._started = facts, time.monotonic()
        self._open = facts.is_writer
        if not facts.is_writer:
            return
        # tensorboard is slow to import: only the writer pays for it
        from megatron_vila.training.event_file import EventFile

        self._report = Reporting()
        self._try(METRICS_FILE, lambda: truncate_after(self.folder / METRICS_FILE, facts.start_step))
        self._jsonl = AppendFile(self.folder / METRICS_FILE)
        self._tensorboard = EventFile(self.folder / "tensorboard", first_step=facts.start_step + 1)
        self._progress = progress_display(self._console or LastingConsole(), facts.total_steps, facts.start_step)
        if facts.peak is not None:
            self.message(
                f"MFU: model FLOPs against {facts.peak / 1e12:.0f} TFLOP/s per GPU; causal attention counts as half, "
                "recomputation and padding do not count"
            )

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        if not self._open:
            return
        self._write_line(self._record([metrics]))
        self._window.append(metrics)
        if metrics.step % self._log_every == 0 or metrics.step == self._facts.total_steps:
            record = self._record(self._window)
            self._window = []
            self._show(lambda: self._progress.step(record))
            self._tell_limit(record)
            self._write_scalars(_scalars(record), metrics.step)
        else:
            self._show(lambda: self._progress.advance(metrics.step))

    def result(self, step: int, task: TaskName, results: Mapping[str, float]) -> None:
        """Record what a task gave after ``step``, such as ``{"accuracy": 0.93, "chance": 0.125}`` of an evaluation."""
        if not self._open:
            return
        record = {f"{task.prefix}_{name}": value for name, value in results.items()}
        self._write_line({"step": step} | record)
        self._write_scalars({f"{task.prefix}/{name}": value for name, value in results.items()}, step)
        # Zero counts of samples that were left out or truncated are not shown.
        told = {n: v for n, v in results.items() if v or not n.startswith(("left_out", "truncated"))}
        self.message(f"{task.word} after step {step}: " + ", ".join(f"{n} {v:.4g}" for n, v in told.items()))

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._open:
            self._show(lambda: self._progress.message(text))

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Close the files and write ``summary.json``: totals of the whole run and ``summary``; returns it ({} elsewhere)."""
        self.close()
        if not self._facts.is_writer:
            return {}
        totals = self._try(METRICS_FILE, lambda: summarize(self.folder)) or {}
        summary = dict(summary) | totals | {"wall_s": time.monotonic() - self._started}
        self._try(SUMMARY_FILE, lambda: write_json(self.folder / SUMMARY_FILE, summary))
        return summary

    def close(self) -> None:
        """Stop the progress bar, close the files and draw the loss curve; calls after the first do nothing."""
        if not self._open:
            return
        self._open = False
        self._show(self._progress.stop)
        self._try(METRICS_FILE, self._jsonl.close)
        self._try("tensorboard", self._tensorboard.close)
        self._try(PLOT_FILE, self._plot)

    def _plot(self) -> None:
        # matplotlib is slow to import: only the writer pays for it
        from megatron_vila.training.plots import plot_runs

        plot_runs([self.folder], self.folder / PLOT_FILE)

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        return self._report.attempt(str(self.folder / name), action)

    def _show(self, action: Callable[[], None]) -> None:
        self._report.attempt("the progress line", action)

    def _record(self, window: list[StepMetrics]) -> dict[str, Any]:
        """The last step of ``window`` with rates over all of it."""
        last = asdict(window[-1])
        seconds = sum(m.step_s for m in window)
        rates = {
            "tokens_per_s_per_gpu": sum(m.tokens for m in window) / seconds / self._facts.ranks,
            "frames_per_s": sum(m.frames for m in window) / seconds,
            "mfu": mfu(sum(m.model_flops for m in window), seconds, self._facts.ranks, self._facts.peak),
            "data_wait_s": sum(m.data_wait_s for m in window) / len(window),
            "step_s": seconds / len(window),
        }
        rates |= averaged([m.loading for m in window], seconds)
        del last["loading"]
        rates |= {f"lr_{part}": lr for part, lr in last.pop("lr").items()} | last.pop("counts")
        return last | rates

    def _tell_limit(self, record: Mapping[str, Any]) -> None:
        """Say what slows the run down, once for each reason. The first steps do not count: nothing is decoded ahead yet."""
        found = limit(record) if record["step"] >= self._facts.start_step + FIRST_JUDGED else None
        if found is not None and found[0] not in self._told:
            self._told.add(found[0])
            self.message(found[1])

    def _write_line(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
        self._try(METRICS_FILE, lambda: self._jsonl.write(line.encode()))

    def _write_scalars(self, scalars: dict[str, float], step: int) -> None:
        self._try("tensorboard", lambda: self._tensorboard.add(scalars, step))


_SPEED = {
    *("tokens_per_s_per_gpu", "frames_per_s", "mfu", "data_wait_s", "step_s", "peak_memory_gib", "model_flops"),
    *(f"{name}_per_s" for name in FRAMES),
    *(*SECONDS, "copy_s"),
}


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of ``path`` after ``step``, and what is not a record, in one atomic replacement."""
    if path.exists():
        kept = [line for line, record in read_records(path) if 0 < record["step"] <= step]
        replace_file(path, lambda temporary: temporary.write_bytes(b"".join(kept)))


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """What TensorBoard shows of a step's record."""
    known = {name: value for name, value in record.items() if name != "step" and value is not None}
    return {f"{'speed' if name in _SPEED else 'train'}/{name}": value for name, value in known.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

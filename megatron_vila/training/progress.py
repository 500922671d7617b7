"""The progress of a run on the screen: a live bar on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class ProgressDisplay(Protocol):
    """Where the records of ``metrics.py`` are shown."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step with its numbers."""

    def advance(self, step: int) -> None:
        """A step without a line of its own is done."""

    def message(self, text: str) -> None:
        """Print a line that stays."""

    def stop(self) -> None:
        """Leave the terminal as it was."""


def progress_display(console: Console, total_steps: int, start_step: int) -> ProgressDisplay:
    """A live bar if ``console`` is a terminal, else one line per logged step."""
    kind = LiveBar if console.is_terminal else PlainLines
    return kind(console, total_steps, start_step)


def describe(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and formatted values of a record, in the order of reading; the MFU is left out where it is not known."""
    fields = [
        ("loss", f"{record['loss']:.4f}"),
        ("lr", _learning_rates(record)),
        ("grad norm", f"{record['grad_norm']:.3f}"),
        ("tokens/s/GPU", _rate(record["tokens_per_s_per_gpu"])),
        ("frames/s", _rate(record["frames_per_s"])),
    ]
    if record["mfu"] is not None:
        fields.append(("MFU", f"{100 * record['mfu']:.1f}%"))
    fields += [
        ("data wait", f"{record['data_wait_s']:.3f}s"),
        *([("source frames/s", _rate(record["source_frames_per_s"]))] if record.get("source_frames_per_s") else []),
        *([("rows full", f"{100 * record['row_fill']:.1f}%")] if record.get("row_fill") else []),
        *([("spread", f"{100 * record['predicted_spread']:.1f}%")] if record.get("predicted_spread") else []),
        ("memory", f"{record['peak_memory_gib']:.1f}GiB"),
        ("skipped", str(record["skipped"])),
    ]
    if "left_out_broken" in record:
        fields.append(("broken", str(record["left_out_broken"])))
    return fields


def _learning_rates(record: Mapping[str, Any]) -> str:
    rates = {name.removeprefix("lr_"): value for name, value in record.items() if name.startswith("lr_")}
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):.2e}"
    return " ".join(f"{part}={lr:.2e}" for part, lr in rates.items())


def _rate(value: float) -> str:
    return f"{value:.0f}" if not math.isfinite(value) or value >= 100 else f"{value:.1f}"


class PlainLines:
    """One line per logged step, for pipes and log files."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console, self._total, self._start = console, total_steps, start_step
        self._started = time.monotonic()

    def step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        values = "  ".join(f"{name} {value}" for name, value in describe(record))
        left = (time.monotonic() - self._started) / (step - self._start) * (self._total - step)
        self.message(
            f"step {step:>{len(str(self._total))}}/{self._total}  {values}  left {timedelta(seconds=round(left))}"
        )

    def advance(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        # out(), not print(): a line in a log file must not be folded at 80 columns
        self._console.out(text, highlight=False)
        self._console.file.flush()

    def stop(self) -> None:
        pass


class LiveBar:
    """A bar with the numbers of the last logged step below it."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._bar = _BarWithNumbers(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step)
        self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        numbers = [Text.assemble((name + " ", "dim"), (value, "bold")) for name, value in describe(record)]
        self._bar.update(self._task, completed=record["step"], numbers=_Pieces(numbers))

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def message(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()


class _Pieces:
    """Pieces of text in a row, as many to a line as fit: none is broken in two."""

    def __init__(self, pieces: Sequence[Text]) -> None:
        self._pieces = pieces

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Text]:
        line = Text()
        for piece in self._pieces:
            if line and line.cell_len + 2 + piece.cell_len > options.max_width:
                yield line
                line = Text()
            line = Text("  ").join([line, piece]) if line else piece
        yield line


class _BarWithNumbers(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield task.fields.get("numbers", "")

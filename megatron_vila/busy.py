"""What is shown while something takes long: a line that moves on a terminal, now and then a line in a log.

No other module of the package is imported here, and no torch: these lines are shown while those are imported.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

INTERVAL_S = 20.0
"""Seconds between two lines of a log."""


class LastingConsole(Console):
    """A console on stdout for what goes on when nobody reads any more: ``| head``, or Ctrl-C, which ends a ``| tee`` too."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process."""
        self.quiet = True


@contextmanager
def busy(text: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show ``text`` and the seconds since the start of the block until the block ends; calling the value changes the text.

    On a terminal the line leaves no trace. Elsewhere a line is printed every ``INTERVAL_S`` seconds, none in a short block.
    """
    console = console or LastingConsole()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, refresh_per_second=8) as line:
            task = line.add_task(text)
            yield lambda changed: line.update(task, description=changed)
        return

    def change(changed: str) -> None:
        nonlocal text
        text = changed

    with _Lines(console, lambda: f"{text} ..."):
        yield change


@contextmanager
def counted(text: str, total: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """A bar of ``total`` pieces of work; the value, called from any thread, counts one more.

    On a terminal the full bar stays. Elsewhere a line says how far it is every ``INTERVAL_S`` seconds and at the end.
    """
    console = console or LastingConsole()
    if console.is_terminal:
        columns = (TextColumn(text), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(*columns, TimeRemainingColumn(), console=console, expand=True, refresh_per_second=4) as bar:
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)
        return
    done, lock = 0, threading.Lock()

    def count() -> None:
        nonlocal done
        with lock:
            done += 1

    with _Lines(console, lambda: f"{text}: {done} of {total}") as lines:
        yield count
        lines.print()


class CurrentStdout(logging.StreamHandler):
    """A log handler that writes to what ``sys.stdout`` is at the time: a line that moves puts itself below what is printed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """A closed pipe or a full disk is no fault of the program: no traceback for each line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Lines:
    """Prints ``describe()`` with the time that has passed, every ``INTERVAL_S`` seconds, from a thread of its own."""

    def __init__(self, console: Console, describe: Callable[[], str]) -> None:
        self._console, self._describe = console, describe
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> _Lines:
        self._started_s = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def print(self) -> None:
        # out(), not print(): a line in a log file must not be folded at 80 columns
        self._console.out(f"{self._describe()} ({time.monotonic() - self._started_s:.0f} s)", highlight=False)
        self._console.file.flush()

    def _repeat(self) -> None:
        with contextlib.suppress(OSError):  # an output that is closed or full
            while not self._ended.wait(INTERVAL_S):
                self.print()

"""Numbers and rank lists as short text, and tables that read the same on a terminal and in a file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 110
"""Columns of what goes into a pipe or a file, and the most on a terminal."""

NARROWEST = 80

_NUMBER = re.compile(r"\d[\d .]*( ([KMGT]i)?B| m?s| %)?|-|\.\.")


def console(file: TextIO) -> Console:
    """A console as wide as the terminal, between 80 and 110 columns; 110 where ``file`` is none."""
    width = WIDTH
    if file.isatty():
        width = min(WIDTH, max(NARROWEST, shutil.get_terminal_size((NARROWEST, 24)).columns))
    # File names may hold brackets and colons: nothing is read as markup.
    return Console(width=width, file=file, highlight=False, markup=False, emoji=False)


def table(out: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns of plain numbers (a unit may follow) are right-aligned."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    cells = [[str(cell) for cell in row] for row in rows]
    for name, column in zip(columns, zip(*cells, strict=True), strict=True):
        numeric = all(_NUMBER.fullmatch(cell) for cell in column)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        grid.add_row(*row)
    out.print(title, style="bold")
    out.print(grid)
    out.print()


def count(n: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``4 micro-batches``."""
    ending = "" if n == 1 else "es" if noun.endswith("ch") else "s"
    return f"{n} {noun}{ending}"


def number(n: int) -> str:
    """Thousands apart: 524 288."""
    return f"{n:,}".replace(",", " ")


def size(n: int) -> str:
    """Bytes in a readable binary unit."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """``1.25 s``, ``12.5 ms``, ``0.0125 ms``: three digits that count."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1000 * seconds, "ms")
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"


def rank_list(ranks: Sequence[int]) -> str:
    """Ascending ranks as ranges and strides: ``0-7``, ``0, 4 .. 60 (every 4th)``, ``0-15, 128-143``."""
    ranks = list(ranks)
    if len(ranks) > 4:
        steps = {b - a for a, b in zip(ranks, ranks[1:], strict=False)}
        if len(steps) == 1 and steps != {1}:
            step = steps.pop()
            return f"{ranks[0]}, {ranks[1]} .. {ranks[-1]} (every {_ordinal(step)})"
    pieces = ranges(ranks)
    return pieces if len(pieces) <= 44 else f"{', '.join(pieces.split(', ')[:3])} .. {ranks[-1]} ({len(ranks)} ranks)"


def ranges(values: Sequence[int] | np.ndarray) -> str:
    """Ascending integers as ranges: ``0-2047, 30720-32767``; ``-`` if there are none."""
    array = np.asarray(values, dtype=np.int64)
    if not len(array):
        return "-"
    cuts = np.flatnonzero(np.diff(array) != 1)
    starts = array[np.concatenate([[0], cuts + 1])]
    ends = array[np.concatenate([cuts, [len(array) - 1]])]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts.tolist(), ends.tolist(), strict=True))


def _ordinal(n: int) -> str:
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"

"""Results of a needle test on disk: one JSON file, replaced after each cell, so that a test that was ended goes on where it was.

A cell is a number of frames and a depth in percent. Cells of another grid under the same settings are kept: a map can be made
finer or longer later. Other settings (model, haystack, needles, ...) are refused, because one map would mix two tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_vila.errors import UserError
from megatron_vila.training.summary import write_json

RESULTS_FILE = "needle.json"
FORMAT = 1
PLACE = tuple[int, float]
"""Frames and depth of a cell."""


class ResultsError(UserError):
    """A file of results cannot be gone on with; the text says why and what to do."""


@dataclass(frozen=True)
class Answered:
    """One needle in one cell: the model's ``answer`` as text, and whether it is ``right``."""

    needle: int
    expected: str
    answer: str
    right: bool


@dataclass(frozen=True)
class CellResult:
    """``frames`` of the video with the needle among them at ``depth`` percent, as frame ``place``; ``tokens`` of the longest
    prompt. ``seconds`` is the time of the cell."""

    frames: int
    depth: float
    place: int
    tokens: int
    seconds: float
    answers: tuple[Answered, ...]

    @property
    def score(self) -> float:
        """Mean over the needles, 0 to 1."""
        return sum(answer.right for answer in self.answers) / len(self.answers)


@dataclass
class Results:
    """What has been found so far. ``settings`` are what all cells have in common, ``trained_frames`` the most frames of a video
    that the model was trained on, where that is known."""

    settings: dict[str, Any]
    trained_frames: int | None = None
    cells: dict[PLACE, CellResult] = field(default_factory=dict)

    def add(self, cell: CellResult) -> None:
        self.cells[cell.frames, cell.depth] = cell

    def mean(self, trained: bool | None = None) -> float | None:
        """Mean score of the cells of trained lengths, of the others, or (None) of all; None without any such cell."""
        scores = [
            cell.score
            for cell in self.cells.values()
            if trained is None or trained == (self.trained_frames is not None and cell.frames <= self.trained_frames)
        ]
        return math.fsum(scores) / len(scores) if scores else None

    def write(self, path: Path) -> None:
        """In one atomic replacement. Raises ``OSError``."""
        cells = sorted(self.cells.values(), key=lambda cell: (cell.frames, cell.depth))
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "trained_frames": self.trained_frames,
            "score": self.mean(),
            "score_trained": self.mean(True) if self.trained_frames is not None else None,
            "score_beyond": self.mean(False) if self.trained_frames is not None else None,
            "cells": [{**asdict(cell), "score": cell.score} for cell in cells],
        }
        write_json(path, content)


def read_results(path: Path) -> Results:
    """Raises ``ResultsError`` for a file that no needle test has written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ResultsError(f"{path} has format {content['format']}, this version writes {FORMAT}; {_CURE}")
        results = Results(content["settings"], content["trained_frames"])
        for stored in content["cells"]:
            answers = tuple(Answered(**answer) for answer in stored["answers"])
            values = {name: stored[name] for name in ("frames", "depth", "place", "tokens", "seconds")}
            results.add(CellResult(**values, answers=answers))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path} cannot be read as the results of a needle test ({reason}); {_CURE}") from error
    return results


_CURE = "take another --out, or begin anew with --restart"


def resume(path: Path, settings: Mapping[str, Any], trained_frames: int | None, restart: bool) -> Results:
    """The results to go on with: those of ``path`` if they were found under ``settings``, else none.

    Raises ``ResultsError`` for results of other settings, unless ``restart`` says that they may be lost.
    """
    if restart or not path.exists():
        return Results(dict(settings), trained_frames)
    found = read_results(path)
    changes = _changes(found.settings, settings)
    if changes:
        raise ResultsError(f"{path} holds results of other settings ({'; '.join(changes)}); {_CURE}")
    found.trained_frames = trained_frames
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def percent(score: float) -> str:
    """A score of 0 to 1 in percent with one digit, cut, so that 100 stands only where nothing was missed."""
    return f"{int(1000 * score + 1e-9) / 10:g}"

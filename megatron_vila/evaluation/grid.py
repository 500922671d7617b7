"""The cells of a needle test: numbers of frames and depths. Pure, for a command line that is wrong in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_vila.errors import SettingError

GENERATE, TEACHER_FORCING = MODES = ("generate", "teacher-forcing")
"""How an answer is got, see ``needle.py``."""


@dataclass(frozen=True)
class Cell:
    """``frames`` frames, the needle among them at ``depth`` percent: 0 is the first frame, 100 the last."""

    frames: int
    depth: float

    @property
    def place(self) -> int:
        """The needle's frame, from 0."""
        # What a percentage loses as a float must not cost a frame.
        return int(self.depth * (self.frames - 1) / 100 + 1e-9)


def grid(frames: Iterable[int], depths: Iterable[float]) -> list[Cell]:
    """Every number of frames with every depth, short videos first. Raises ``SettingError`` for numbers that make no cell."""
    frames, depths = sorted(set(frames)), sorted(set(depths))
    if not frames or frames[0] < 1:
        raise SettingError(f"--frames {','.join(map(str, frames))}: give numbers of at least 1, as 8,16,32")
    if not depths or not all(0 <= depth <= 100 for depth in depths):
        raise SettingError(
            f"--depths {','.join(f'{d:g}' for d in depths)}: give percentages from 0 to 100, as 0,25,50,75,100"
        )
    return [Cell(count, depth) for count in frames for depth in depths]

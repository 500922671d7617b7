"""Pictures as units: what of an image or a video is encoded together, what that costs, and how many LLM tokens it becomes.

Everything behind this file deals with units: documents and rows hold one reference (``plan/row.py``) and one run of places for
each; whole units are dealt to ranks by cost; stage 2, memory and FLOPs add up what their units say. No unit need have the tokens,
the squares or the cost of another.

A new kind of unit (tiles of a picture, several scales of it, frames pooled over time) is one more class beside ``Squares``, and
``pictures_of`` chooses it. Its one method, ``units(frames, is_video, size)``, gives the units of a medium of which ``frames``
frames are taken (one of an image). What it must provide:

* The ``frames`` of its units add up to ``frames``. A unit takes its frames where the one before stopped, in the order of the
  medium; the last may have fewer.
* It is a pure function of its arguments and of the fields of its class, because every rank plans alone. The class is a dataclass
  of numbers.
* ``needs_size`` tells whether the units depend on the size of the pictures. Only then does ``VilaDataset`` read that: from the
  header of a picture, and by decoding the first frame of a video. Plans that are made before any medium is known give no size,
  and are told as many units as a medium of any size may have.
* More frames of a video never have fewer tokens, because a video that is too long is cut by its number of frames.
* ``cost`` counts the patches that the tower sees, so that units of different kinds are dealt fairly.

Three other places must do what a unit promises. ``preprocess`` in ``data/images.py`` turns each frame into ``tiles`` squares; the
loader lays them one after the other, frame by frame, and refuses another number. Tower and projector turn the ``squares`` of a
unit into its ``tokens``: today these are the tokens of its squares in their order (``models/vila.py``), and stage 2 refuses
another number than the plan has. The classes for transformers (``hf/vila``) have one number of tokens for every picture, saved
with the processor as ``tokens_per_frame``.

Legend: a square is a picture as the tower takes it, ``vision.image_size`` pixels a side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from megatron_vila.config.schema import ModelConfig
from megatron_vila.plan.geometry import patches_per_square, tokens_per_square


@dataclass(frozen=True)
class Unit:
    """``frames`` frames of a medium, each cut into ``tiles`` squares, which together become ``tokens`` LLM tokens in consecutive
    places; ``cost`` is that of encoding them, in patches. Raises ``ValueError`` for a number below 1."""

    frames: int
    tiles: int
    tokens: int
    cost: int

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError(f"{self}: each number of a unit is at least 1")

    @property
    def squares(self) -> int:
        """What the tower sees of it."""
        return self.frames * self.tiles


Size = tuple[int, int]
"""Width and height in pixels of a picture as it is shown, upright."""


class Pictures(Protocol):
    """How media become units; see the top of this file."""

    needs_size: ClassVar[bool]

    def units(self, frames: int, is_video: bool, size: Size | None = None) -> tuple[Unit, ...]:
        """The units of a medium with ``frames`` frames of ``size``, in their order; without a size, the most that may be."""


@dataclass(frozen=True)
class Squares:
    """Each frame is one square and one unit, the same for images and videos."""

    unit: Unit
    needs_size: ClassVar[bool] = False

    def units(self, frames: int, is_video: bool, size: Size | None = None) -> tuple[Unit, ...]:
        return (self.unit,) * frames


def pictures_of(model: ModelConfig) -> Pictures:
    """The kind of units that ``model`` takes."""
    patches = patches_per_square(model.vision)
    return Squares(Unit(frames=1, tiles=1, tokens=tokens_per_square(model.vision, model.projector), cost=patches))


def places(units: Sequence[Unit], separators: int) -> int:
    """Tokens of a medium's units with ``separators`` tokens behind each."""
    return sum(unit.tokens for unit in units) + separators * len(units)


def row_vision(pictures: Pictures, seq_length: int) -> int:
    """Vision cost that a row of ``seq_length`` tokens has room for: that of as many frames of a video as fit it."""
    (unit, *_) = pictures.units(1, True)
    return max(1, seq_length // unit.tokens) * unit.cost


def most_frames(pictures: Pictures, room: int, separators: int = 0, limit: int | None = None) -> int:
    """Most frames of one video, at most ``limit``, that fit ``room`` tokens, ``separators`` behind each unit counted."""

    def too_many(frames: int) -> bool:
        return places(pictures.units(frames, True), separators) > room

    if limit is not None and not too_many(limit):
        return limit
    guess = room // places(pictures.units(1, True), separators)  # right where all frames take as much as the first
    low, high = (0, guess) if too_many(guess) else (guess, guess + 1)
    while not too_many(high):
        low, high = high, 2 * high
    return bisect_left(range(high), True, lo=low + 1, key=too_many) - 1


def in_units(units: Sequence[Unit]) -> str:
    """What to call the frames of ``units`` behind their number: "frames", or "frames in 2 units" where several share one."""
    together = sum(unit.frames for unit in units) > len(units)
    return f"frames in {len(units)} unit{'s' * (len(units) > 1)}" if together else "frames"


def tokens_each(units: Sequence[Unit], separators: int = 0) -> str:
    """Tokens of a unit with ``separators`` tokens behind it: "4", or "4 to 9" where they differ. At least one unit."""
    tokens = [unit.tokens + separators for unit in units]
    return str(tokens[0]) if min(tokens) == max(tokens) else f"{min(tokens)} to {max(tokens)}"

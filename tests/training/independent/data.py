"""Which samples stand in which row: order, replacement, packing, and the counts that a run reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.training.independent.samples import Outline, Pictures, Sample, outline, sample_of


class Rows:
    """The rows of a run over ``records``: ``self(g)`` gives the samples of row g.

    With ``packed`` the samples of an epoch fill rows of at most ``longest`` tokens, in order.
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], folder: Path, pictures: Pictures, longest: int, seed: int, packed: bool = False
    ) -> None:
        self.seed, self.longest, self.packed = seed, longest, packed
        self.outlines = [_tried(outline, record, folder, pictures, longest) for record in records]
        self.samples = [_tried(sample_of, o, pictures) if isinstance(o, Outline) else o for o in self.outlines]

    def __call__(self, number: int) -> list[Sample]:
        return [self.samples[place] for _, place in self._row(number) if place is not None]

    def count(self, first: int, end: int) -> dict[str, int]:
        """What became of the samples of these rows."""
        counts = dict.fromkeys(("drawn", "replaced_broken", "replaced_too_long", "truncated", "unsupervised", "left_out"), 0)
        for slot, place in (pair for number in range(first, end) for pair in self._row(number)):
            counts["drawn"] += 1
            if place is None:
                counts["left_out"] += 1
                continue
            counts["replaced_too_long" if self.samples[slot] is None else "replaced_broken"] += place != slot
            counts["truncated"] += self.outlines[place].truncated
            counts["unsupervised"] += not self.samples[place].learned
        return counts

    def _row(self, number: int) -> list[tuple[int, int | None]]:
        """For each slot the sample that stands there: its own, or the next one that can be used, which in a row of several
        must not be longer; None: nothing can."""
        slots = self._slots(number)
        pairs = []
        for slot in slots:
            room = len(self.outlines[slot].ids) if len(slots) > 1 else self.longest
            around = [*range(slot, len(self.samples)), *range(slot)]
            fits = (k for k in around if isinstance(self.samples[k], Sample) and len(self.samples[k].ids) <= room)
            pairs.append((slot, next(fits, None)))
        return pairs

    def _slots(self, number: int) -> list[int]:
        if not self.packed:
            epoch, place = divmod(number, len(self.samples))
            return [order_of(len(self.samples), self.seed, epoch)[place]]
        epoch = 0
        while number >= len(rows := self._packed(epoch)):
            number, epoch = number - len(rows), epoch + 1
        return rows[number]

    def _packed(self, epoch: int) -> list[list[int]]:
        rows: list[list[int]] = [[]]
        for slot in order_of(len(self.samples), self.seed, epoch):
            used = sum(len(self.outlines[other].ids) for other in rows[-1])
            if rows[-1] and used + len(self.outlines[slot].ids) > self.longest:
                rows.append([])
            rows[-1].append(slot)
        return rows


def order_of(samples: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of an epoch: by splitmix64 of seed, epoch and place."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    start = mix((mix(seed) + epoch) % 2**64)
    return sorted(range(samples), key=lambda index: mix((start + index) % 2**64))


def _tried(make: Any, *arguments: Any) -> Any:
    """What ``make`` makes, or the error that a broken file raises."""
    try:
        return make(*arguments)
    except (OSError, ValueError) as error:
        return error

"""Which samples stand in which row: order, what is left out, packing, and the counts that a run reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.training.independent.samples import Outline, Pictures, Sample, outline, sample_of


class Rows:
    """The rows of a run over ``records``, ``rows`` of them a step: ``self(g)`` gives the samples of row g.

    With ``packed`` the samples that wait, four steps of them, fill rows of at most ``longest`` tokens.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        folder: Path,
        pictures: Pictures,
        longest: int,
        seed: int,
        packed: bool = False,
        rows: int = 2,
    ) -> None:
        self.seed, self.longest, self.packed, self.rows = seed, longest, packed, rows
        self.outlines = [_tried(outline, record, folder, pictures, longest) for record in records]
        self.samples = [_tried(sample_of, o, pictures) if isinstance(o, Outline) else o for o in self.outlines]
        self.drawn, self.waiting, self.wrecks = 0, [], set()
        self.steps: list[list[list[int]]] = []
        self.counts: list[dict[str, int]] = []

    def __call__(self, number: int) -> list[Sample]:
        step, row = divmod(number, self.rows)
        while len(self.steps) <= step:
            self._step()
        return [self.samples[place] for place in self.steps[step][row]]

    def count(self, first: int, end: int) -> dict[str, int]:
        """What became of the samples of the steps with these rows."""
        self(end - 1)
        steps = self.counts[first // self.rows : end // self.rows]
        return {name: sum(counts[name] for counts in steps) for name in steps[0]}

    def _step(self) -> None:
        while True:
            counts = dict.fromkeys(("drawn", "left_out_broken", "left_out_too_long", "truncated", "unsupervised"), 0)
            drawn, waiting = self.drawn, [place for place in self.waiting if place not in self.wrecks]
            counts["left_out_broken"] = len(self.waiting) - len(waiting)
            # Enough waits for four steps, or for one where a row holds one sample.
            while self._size(waiting) < (4 * self.rows * self.longest if self.packed else self.rows):
                epoch, place = divmod(drawn, len(self.samples))
                place, drawn = order_of(len(self.samples), self.seed, epoch)[place], drawn + 1
                if self.outlines[place] is None:
                    counts["left_out_too_long"] += 1
                elif place in self.wrecks or not isinstance(self.outlines[place], Outline):
                    counts["left_out_broken"] += 1
                else:
                    waiting.append(place)
            rows = self._pack(list(waiting)) if self.packed else [[place] for place in waiting[: self.rows]]
            used = [place for row in rows for place in row]
            # Pictures are looked at last: what turns out to be a wreck is taken out, and the step is made again.
            wrecks = {place for place in used if not isinstance(self.samples[place], Sample)}
            if not wrecks:
                break
            self.wrecks |= wrecks
        for place in used:
            waiting.remove(place)
            counts["truncated"] += self.outlines[place].truncated
            counts["unsupervised"] += not self.samples[place].learned
        counts["drawn"] = drawn - self.drawn
        self.drawn, self.waiting = drawn, waiting
        self.steps.append(rows)
        self.counts.append(counts)

    def _size(self, places: Sequence[int]) -> int:
        return sum(len(self.outlines[place].ids) for place in places) if self.packed else len(places)

    def _pack(self, waiting: list[int]) -> list[list[int]]:
        """Each row opens with the oldest and takes the longest that fits, of the oldest step's worth before the others."""
        order = list(enumerate(waiting))
        newest = len(order)
        while newest and self._size(waiting[newest - 1 :]) <= 3 * self.rows * self.longest:
            newest -= 1
        rows = []
        for _ in range(self.rows):
            row = [order.pop(0)]
            for young in (False, True):
                while True:
                    room = self.longest - self._size([place for _, place in row])
                    fits = [o for o in order if (o[0] >= newest) == young and self._size([o[1]]) <= room]
                    if not fits:
                        break
                    row.append(max(fits, key=lambda o: (self._size([o[1]]), -o[0])))
                    order.remove(row[-1])
            rows.append([place for _, place in sorted(row)])
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

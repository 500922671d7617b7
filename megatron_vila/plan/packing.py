"""Which waiting samples form the rows of a step: best fit within a bounded look-ahead, on numbers alone.

Every row opens with the sample that has waited longest, so none waits for ever. Then it takes the largest sample that still fits,
again and again: first of the oldest global batch of the look-ahead, then of what came after it. Best fit over all of them would
leave the small samples to the end, and a step would no longer hold the kinds in the proportions in which they come; first come,
first served within the oldest batch alone would leave gaps.

Rows have room for tokens and for vision cost (patches that the tower encodes), and a sample needs both.

Legend: n waiting samples, oldest first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

LOOK_AHEAD = 4
"""Global batches of tokens that wait at the start of a step, the step's own included."""


def pack_samples(
    tokens: Sequence[int], vision: Sequence[int], rows: int, capacity: int, vision_capacity: int
) -> list[list[int]]:
    """Places (0 to n - 1, ascending) of the samples of each of at most ``rows`` rows; the others go on waiting.

    ``tokens`` and ``vision`` are those of each sample; a row holds at most ``capacity`` tokens and ``vision_capacity`` vision
    cost, but for a sample that alone has more of the latter, which gets a row of its own. Raises ``ValueError`` for a sample of
    more than ``capacity`` tokens.
    """
    if max(tokens, default=0) > capacity:
        raise ValueError(f"a sample of {max(tokens)} tokens cannot be packed into rows of {capacity}")
    newer = _newer(tokens, (LOOK_AHEAD - 1) * rows * capacity)
    pools = _Pool(tokens, range(newer)), _Pool(tokens, range(newer, len(tokens)))
    taken = bytearray(len(tokens))
    packed: list[list[int]] = []
    opener = 0
    while len(packed) < rows:
        opener = taken.find(0, opener)
        if opener < 0:
            break
        taken[opener] = 1
        row, room, vision_room = [opener], capacity - tokens[opener], vision_capacity - vision[opener]
        for pool in pools:
            while (place := pool.take(room, vision_room, vision, taken)) is not None:
                taken[place] = 1
                row.append(place)
                room -= tokens[place]
                vision_room -= vision[place]
        packed.append(sorted(row))
    return packed


def _newer(tokens: Sequence[int], most: int) -> int:
    """The first of the newest samples that have at most ``most`` tokens together."""
    first, total = len(tokens), 0
    while first and total + tokens[first - 1] <= most:
        first -= 1
        total += tokens[first]
    return first


class _Pool:
    """Samples from small to large; of equal ones the oldest is the last. Those ``taken`` elsewhere are dropped when met."""

    def __init__(self, tokens: Sequence[int], places: range) -> None:
        self._places = sorted(places, key=lambda place: (tokens[place], -place))
        self._sizes = [tokens[place] for place in self._places]

    def take(self, room: int, vision_room: int, vision: Sequence[int], taken: bytearray) -> int | None:
        """The place of the largest sample that fits, taken out of the pool; None if none does."""
        at = bisect_right(self._sizes, room) - 1
        while at >= 0:
            place = self._places[at]
            if taken[place] or vision[place] <= vision_room or not vision[place]:
                del self._places[at], self._sizes[at]
                if not taken[place]:
                    return place
            at -= 1
        return None

"""Which replica trains on which rows of a step, so that all take about as long. Pure arithmetic on predicted costs."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_SWAPS = 1000


def deal_rows(costs: Sequence[int], replicas: int) -> list[list[int]]:
    """The rows (numbers, ascending) of each replica: the same number for each, with sums of ``costs`` as equal as can be found.

    Costs are whole numbers, so that sums do not depend on their order. Replicas are ordered by their first row; one replica gets
    all rows in their order. Raises ``ValueError`` if the rows cannot be dealt in equal numbers.
    """
    if replicas < 1 or len(costs) % replicas:
        raise ValueError(f"{len(costs)} rows cannot be dealt to {replicas} replicas in equal numbers")
    each = len(costs) // replicas
    hands: list[list[int]] = [[] for _ in range(replicas)]
    sums = [0] * replicas
    # The most expensive row goes to the replica that has least so far; then swaps even out what is left.
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        least = min((hand for hand in range(replicas) if len(hands[hand]) < each), key=lambda hand: (sums[hand], hand))
        hands[least].append(row)
        sums[least] += costs[row]
    for _ in range(_MOST_SWAPS):
        if not _swap(costs, hands, sums):
            break
    return sorted(sorted(hand) for hand in hands)


def spread(costs: Sequence[int], hands: Sequence[Sequence[int]]) -> float:
    """How far the replicas are apart: the difference between the most and the least expensive hand, over their mean."""
    sums = [sum(costs[row] for row in hand) for hand in hands]
    return (max(sums) - min(sums)) * len(sums) / sum(sums) if sum(sums) else 0.0


def _swap(costs: Sequence[int], hands: list[list[int]], sums: list[int]) -> bool:
    """Exchange a row of the most expensive hand for a cheaper one of a cheap hand where that helps; False if nothing does."""
    most = max(range(len(hands)), key=lambda hand: (sums[hand], -hand))
    for other in sorted(range(len(hands)), key=lambda hand: (sums[hand], hand)):
        gap = sums[most] - sums[other]
        pairs = [
            (abs(2 * (costs[mine] - costs[theirs]) - gap), mine, theirs)
            for mine in hands[most]
            for theirs in hands[other]
            if 0 < costs[mine] - costs[theirs] < gap
        ]
        if not pairs:
            continue
        _, mine, theirs = min(pairs)
        hands[most][hands[most].index(mine)], hands[other][hands[other].index(theirs)] = theirs, mine
        moved = costs[mine] - costs[theirs]
        sums[most] -= moved
        sums[other] += moved
        return True
    return False

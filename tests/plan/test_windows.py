"""Sliding windows cut into blocks for plain and causal kernels."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vila.plan.tokens import ALL, FRONT, ring_step
from megatron_vila.plan.windows import window_parts


def places(lengths: tuple[int, ...], chunks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Document and position in it of each token of a ring rank that holds ``chunks`` of each document."""
    return [
        (document, chunk * (length // 2) + i)
        for document, length in enumerate(lengths)
        for chunk in chunks
        for i in range(length // 2)
    ]


@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 11, 17, 40])
def test_each_pair_in_the_window_is_computed_once_and_no_other(ring, window):
    lengths = (10, 0, 6, 2, 16)
    for rank in range(ring):
        for source in range(ring):
            step = ring_step(ring, rank, (rank - source) % ring)
            last = 2 * ring - 1
            queries = places(lengths, (rank, last - rank) if step.queries == ALL else (last - rank,))
            keys = places(lengths, (source,) if step.keys == FRONT else (source, last - source))
            wanted = [[q[0] == k[0] and 0 <= q[1] - k[1] < window for k in keys] for q in queries]
            times = np.zeros((len(queries), len(keys)), dtype=int)
            for part in window_parts(lengths, ring, rank, source, window):
                assert len(set(part.queries)) == len(part.queries)  # so that outputs can be merged at once
                first_q = first_k = 0
                for n, m in zip(part.lengths_q, part.lengths_k, strict=True):
                    mine = np.ix_(part.queries[first_q : first_q + n], part.keys[first_k : first_k + m])
                    times[mine] += np.tri(n, m, dtype=int) if part.causal else 1
                    first_q, first_k = first_q + n, first_k + m
            assert np.array_equal(times, wanted)

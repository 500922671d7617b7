"""Which attention heads the ranks of a Ulysses group work on.

Legend: H query heads and K key/value heads of a tensor-parallel rank, U ranks of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank of a Ulysses group works on, ``chunks`` times as many as at once.

    ``ulysses`` divides the query heads, and where chunks > 1 ulysses * chunks the key/value heads.
    """

    heads: int
    kv_heads: int
    ulysses: int
    chunks: int = 1

    def __post_init__(self) -> None:
        # What settings ask for is judged by layouts.py.
        assert self.heads % self.kv_heads == 0 and self.heads % self.ulysses == 0, self
        assert self.chunks == 1 or self.kv_heads % (self.ulysses * self.chunks) == 0, self

    @property
    def per_rank(self) -> int:
        """Query heads of a rank after the exchange, all chunks together."""
        return self.heads // self.ulysses

    def query_range(self, rank: int, chunk: int) -> range:
        """Query heads of ``rank`` that travel with ``chunk``."""
        count = self.per_rank // self.chunks
        first = rank * self.per_rank + chunk * count
        return range(first, first + count)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def kv_range(self, rank: int, chunk: int = 0) -> range:
        """Key/value heads that ``rank`` needs for ``chunk``."""
        queries = self.query_range(rank, chunk)
        return range(queries.start // self.group, (queries.stop - 1) // self.group + 1)

    def expansion(self, rank: int) -> list[int] | None:
        """Index into ``kv_range(rank)`` for each kernel key/value head, or None if they are the range itself.

        Kernels share a key/value head among equally many query heads. Where the split cuts a group unevenly, runs of
        gcd(h, H/K) query heads get their own (repeated) key/value head. Chunks never cut a group.
        """
        if self.chunks > 1:
            return None
        run = math.gcd(self.per_rank, self.group)
        mine = self.kv_range(rank)
        index = [(rank * self.per_rank + i) // self.group - mine.start for i in range(0, self.per_rank, run)]
        return None if index == list(range(len(mine))) else index

"""Which attention heads the ranks of a Ulysses group work on.

Legend: H query heads and K key/value heads of a tensor-parallel rank, U ranks of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vila.errors import SettingError


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank of a Ulysses group works on, ``chunks`` times as many as at once. Pure arithmetic.

    Raises ``ValueError`` if ``ulysses`` does not divide the query heads, or ulysses * chunks the key/value heads (chunks > 1).
    """

    heads: int
    kv_heads: int
    ulysses: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise SettingError(f"{self.kv_heads} key/value heads do not divide {self.heads} query heads")
        if self.heads % self.ulysses:
            works = [u for u in range(2, self.heads + 1) if self.heads % u == 0 and u <= 2 * self.ulysses]
            raise SettingError(
                f"ulysses={self.ulysses} does not divide {self.heads} query heads (per tensor-parallel rank); use ulysses="
                f"{' or '.join(map(str, works)) or 1} and put the rest of cp into the ring"
            )

        if self.chunks > 1 and self.kv_heads % (self.ulysses * self.chunks):
            raise SettingError(f"{self.chunks} chunks over ulysses={self.ulysses} do not divide {self.kv_heads} key/value heads")

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

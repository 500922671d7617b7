"""A prompt of MM-SP under Transformers, cut into chunks that go through the model one after the other.

Each chunk is a row of its own, sharded as a training row is. A border never cuts the tokens of a unit of vision
(``adapters/base.py``), so each is read and encoded with the chunk that holds its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vila.hf.mm_sp.cache import ShardedCache
from megatron_vila.hf.mm_sp.data import PlacedSample, ShardCollator
from megatron_vila.plan.chunks import Chunk, cut, part, row_of
from megatron_vila.plan.row import Row


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt from ``first`` on, which no cache holds yet, as ``sample``, and the chunks it is read in."""

    collator: ShardCollator
    sample: PlacedSample
    first: int
    chunks: tuple[Chunk, ...]

    @classmethod
    def of(
        cls, collator: ShardCollator, sample: Mapping[str, Any], first: int, next_position: int, chunk_tokens: int
    ) -> Prompt:
        """``sample`` as the collator takes it, without labels; its tokens follow ``first`` others and go on at ``next_position``.

        Raises ``ValueError`` that lists everything wrong with the sample.
        """
        name = f"what comes after the {first} tokens in the cache" if first else "the prompt"
        placed = collator.prompt(sample, name, next_position)
        return cls(collator, placed, first, cut(placed.document, chunk_tokens))

    def positions(self, chunk: Chunk) -> np.ndarray:
        """The largest position of each token of ``chunk`` over all axes, int64 [tokens]."""
        if self.sample.positions is None:
            return np.arange(self.first + chunk.first, self.first + chunk.stop)
        largest: np.ndarray = self.sample.positions[:, chunk.first : chunk.stop].max(axis=0)
        return largest

    def kept(self, cache: ShardedCache) -> int:
        """How many of the tokens this rank keeps."""
        rows = (self._row(chunk) for chunk in self.chunks)
        return sum(len(cache.kept(row.cu_seqlens, sum(row.lengths))) for row in rows)

    def _row(self, chunk: Chunk) -> Row:
        return row_of([part(self.sample.document, chunk)], [self.first + chunk.first], self.collator.grid)

    def batches(self) -> Iterator[Future[dict[str, Any]]]:
        """This rank's share of each chunk; while one is computed, a thread reads the frames of the next."""
        coming: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(1, "mm_sp_prompt") as thread:
            for chunk in self.chunks:
                coming.append(thread.submit(self._batch, chunk))
                if len(coming) > 1:
                    yield coming.popleft()
            yield from coming

    def _batch(self, chunk: Chunk) -> dict[str, Any]:
        positions, pieces = self.sample.positions, self.sample.pieces[chunk.frames.start : chunk.frames.stop]
        own = None if positions is None else positions[:, chunk.first : chunk.stop]
        return self.collator.share(self._row(chunk), pieces, [own])


def common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    """With how many equal numbers both begin."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter

"""What a rank has to know of a packed row before it trains on it, worked out on the host without asking anybody.

``RowPlan`` holds what is the same for all ranks of a block: the row and its two-stage sharding. ``shard(rank)`` is one rank's
part. A thread of the loader makes both with the row; the thread that trains only copies the arrays to the device
(``models/shard.py``).

Legend: S tokens of the row, s = S/cp tokens of a CP rank, T = S/ring tokens of a ring rank, n supervised tokens held by a rank
(in its tp slice of s), D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Row
from megatron_vila.plan.tokens import (
    NO_PART,
    RankReshard,
    ReshardPlan,
    half_indices,
    local_positions,
    plan_reshard,
    ulysses_permutation,
)


@dataclass(frozen=True)
class AttentionPlan:
    """How 2D attention orders the tokens of a row on one ring rank.

    ``lengths`` are the tokens of each document there. ``halves`` are the slots of the front and of the back chunks, int64 [T/2]
    each; None for a row of one document, where they are its two halves. ``order`` int64 [T] permutes tokens at the Ulysses
    exchange and ``inverse`` undoes it; both are empty where ulysses = 1 and nothing travels.
    """

    lengths: tuple[int, ...]
    halves: tuple[np.ndarray, np.ndarray] | None
    order: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, grid: GridShape, ring_rank: int) -> AttentionPlan:
        """``cu_seqlens`` int64 [D+1] are the documents' boundaries in the row.

        Raises ``ValueError`` if a document is not a multiple of 2*cp.
        """
        lengths = tuple((np.diff(cu_seqlens) // grid.ring).tolist())
        order = np.empty(0, np.int64)
        if grid.ulysses > 1:
            order = ulysses_permutation(cu_seqlens, grid.ulysses, grid.ring, ring_rank)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return cls(lengths, half_indices(cu_seqlens, grid.ring) if len(lengths) > 1 else None, order, inverse)


@dataclass(frozen=True)
class ShardPlan:
    """A row as one rank takes part in it.

    ``frames`` are the row's frames that the rank decodes and encodes, and ``reshard`` its stage 2: none and ``NO_PART`` after the
    first pipeline stage. ``positions`` int64 [s] are the local tokens' positions in their documents, ``token_ids`` int64 [s] hold
    0 at visual places. ``selected`` int64 [n] are the slots (in the rank's tp slice) of supervised tokens, ``labels`` int64 [n]
    their labels, ``documents`` int64 [n] their documents; ``counts`` tells the n of each tp rank.
    """

    row: Row
    frames: range
    reshard: RankReshard
    attention: AttentionPlan
    positions: np.ndarray
    token_ids: np.ndarray
    selected: np.ndarray
    labels: np.ndarray
    documents: np.ndarray
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RowPlan:
    """``row`` on the block of ranks that share it; ``reshard`` deals its frames (stage 1) and visual tokens (stage 2)."""

    row: Row
    grid: GridShape
    reshard: ReshardPlan

    @classmethod
    def of(cls, row: Row, grid: GridShape) -> RowPlan:
        """Raises ``ValueError`` if the row was not packed with the multiples of ``grid``."""
        tokens, costs = [frame.tokens for frame in row.frames], [frame.cost for frame in row.frames]
        return cls(row, grid, plan_reshard(row.cu_seqlens, row.frame_starts, tokens, costs, grid.cp, grid.tp))

    def places(self, rank: int) -> np.ndarray:
        """Places in the row, ascending, of the tokens that ``rank`` holds under Megatron sequence parallelism, int64 [s/tp]."""
        tp = self.grid.coordinates(rank).tp
        return np.split(local_positions(self.row.cu_seqlens, self.grid.cp, self.grid.cp_rank(rank)), self.grid.tp)[tp]

    def shard(self, rank: int) -> ShardPlan:
        """The part of ``rank``, a rank of the grid."""
        row, grid, place = self.row, self.grid, self.grid.coordinates(rank)
        mine = local_positions(row.cu_seqlens, grid.cp, grid.cp_rank(rank))
        token_ids, slices = row.token_ids[mine], np.split(row.labels[mine] != IGNORE, grid.tp)
        selected = np.flatnonzero(slices[place.tp])
        held = mine[place.tp * len(slices[0]) + selected]
        encodes, encoder = place.pp == 0, grid.encoder_rank(rank)
        return ShardPlan(
            row=row,
            frames=self.reshard.frames(encoder) if encodes else range(0),
            reshard=self.reshard.of_rank(encoder) if encodes else NO_PART,
            attention=AttentionPlan.of(row.cu_seqlens, grid, place.ring),
            positions=row.positions[mine],
            token_ids=np.where(token_ids == MEDIA_TOKEN, 0, token_ids),
            selected=selected,
            labels=row.labels[held],
            documents=np.searchsorted(row.cu_seqlens, held, side="right") - 1,
            counts=tuple(int(part.sum()) for part in slices),
        )

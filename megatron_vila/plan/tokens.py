"""Which token of which packed document lives on which rank (Megatron-Core's zigzag, per document), and what follows.

A document padded to a multiple of 2*cp is cut into 2*cp chunks; CP rank c holds chunks c and 2*cp-1-c. The same rule with
R = ring instead of cp describes what a rank holds after the Ulysses all-to-all, because chunks are nested: the U
neighbors of one Ulysses group together hold the chunks r and 2R-1-r of a cut into 2R. Under tensor parallelism the local
sequence of a CP rank is cut into tp equal slices (Megatron sequence parallelism).

Everything here is NumPy on sample metadata: no process group, no device.

Legend: S tokens of a row, D documents, V visual tokens of a row, E = tp*cp encoders (block ranks, tp fastest), U ulysses,
R ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_vila.plan.frames import deal_frames, frame_owner

FRONT, BACK, ALL = "front", "back", "all"


def local_positions(cu_seqlens: np.ndarray, parts: int, part: int) -> np.ndarray:
    """Row positions, ascending, of the tokens of ``part`` when each document is cut zigzag over ``parts`` ranks.

    ``cu_seqlens`` int64 [D+1]; returns int64 [S/parts]: for each document chunk ``part``, then chunk ``2*parts-1-part``.
    Raises ``ValueError`` if a document is not a multiple of 2*parts.
    """
    chunk = _chunks(cu_seqlens, parts)
    starts = cu_seqlens[:-1]
    begins = np.stack([starts + part * chunk, starts + (2 * parts - 1 - part) * chunk], axis=1).ravel()
    return _ranges(begins, np.repeat(chunk, 2))


def owners(cu_seqlens: np.ndarray, cp: int, tp: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block rank (tp fastest) that owns each row position in the LLM, and the token's slot there.

    ``positions`` int64 [n]; returns two int64 [n]. The inverse of ``local_positions`` plus the slices of Megatron
    sequence parallelism. Raises ``ValueError`` if the row is not a multiple of 2*cp*tp.
    """
    total = int(cu_seqlens[-1])
    if total % (2 * cp * tp):
        raise ValueError(f"a row of {total} tokens is not a multiple of 2*cp*tp = {2 * cp * tp}; pack it with that multiple")
    chunk = _chunks(cu_seqlens, cp)
    document = np.searchsorted(cu_seqlens, positions, side="right") - 1
    size = chunk[document]
    offset = positions - cu_seqlens[document]
    index = offset // size
    is_back = index >= cp
    cp_rank = np.where(is_back, 2 * cp - 1 - index, index)
    local = cu_seqlens[document] // cp + is_back * size + offset % size
    per_rank = total // (cp * tp)
    return cp_rank * tp + local // per_rank, local % per_rank


def ulysses_permutation(cu_seqlens: np.ndarray, ulysses: int, ring: int, ring_rank: int) -> np.ndarray:
    """Order that turns the rank-major result of the Ulysses all-to-all into the ring's order.

    After the all-to-all the buffer holds the local tokens of the group's U ranks one after the other; ``buffer[perm]`` is
    ``local_positions(cu_seqlens, ring, ring_rank)``. Returns int64 [S/R].
    """
    members = [local_positions(cu_seqlens, ulysses * ring, ring_rank * ulysses + u) for u in range(ulysses)]
    return np.argsort(np.concatenate(members), kind="stable")


def half_indices(cu_seqlens: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots of the front chunks and of the back chunks in a rank's local order, each int64 [S/(2*parts)]."""
    chunk = _chunks(cu_seqlens, parts)
    starts = cu_seqlens[:-1] // parts
    return _ranges(starts, chunk), _ranges(starts + chunk, chunk)


@dataclass(frozen=True)
class RingStep:
    """One block of the zigzag ring: ``queries`` of this rank against ``keys`` of rank ``source``."""

    source: int
    queries: str
    keys: str
    causal: bool


def ring_step(ring: int, rank: int, step: int) -> RingStep:
    """What ring rank ``rank`` computes at ``step`` (0: its own block, causal in local order).

    A key chunk is visible if it lies before the query chunk. Keys of an earlier rank: its front chunk precedes both of
    ours, its back chunk follows both. Keys of a later rank: both of its chunks precede our back chunk and follow our front
    chunk. Each step costs the same: half of the pairs, nothing masked is computed.
    """
    source = (rank - step) % ring
    if step == 0:
        return RingStep(source, ALL, ALL, causal=True)
    if source < rank:
        return RingStep(source, ALL, FRONT, causal=False)
    return RingStep(source, BACK, ALL, causal=False)


@dataclass(frozen=True)
class RankReshard:
    """Stage 2 for one row as one block rank sees it.

    ``send_counts`` and ``recv_counts`` are the tokens to and from each block rank, itself included. ``send_order`` int64 is the
    order in which it lays out its own visual tokens (numbered as made) for sending: by receiver, then place. ``slots`` int64 are
    the local slots of what it receives. ``moved`` counts the tokens that change rank in the whole block: at 0 nobody sends.
    """

    send_counts: list[int]
    recv_counts: list[int]
    send_order: np.ndarray
    slots: np.ndarray
    moved: int


NO_PART = RankReshard([], [], np.empty(0, np.int64), np.empty(0, np.int64), moved=0)
"""Of a rank that neither makes nor needs visual tokens: one after the first pipeline stage."""


@dataclass(frozen=True)
class ReshardPlan:
    """Stage 2 for one row: how visual tokens go from the encoder that made them to the rank that owns their place.

    ``boundaries`` int64 [E+1] deals the frames; ``maker``, ``owner``, ``slot`` int64 [V] tell for each visual token in row
    order who makes it, who needs it and at which local slot. Nobody has to communicate to know this.
    """

    encoders: int
    boundaries: np.ndarray
    maker: np.ndarray
    owner: np.ndarray
    slot: np.ndarray

    def frames(self, encoder: int) -> range:
        """The frames of the row that ``encoder`` decodes and encodes."""
        return range(int(self.boundaries[encoder]), int(self.boundaries[encoder + 1]))

    def of_rank(self, rank: int) -> RankReshard:
        """What block rank ``rank`` sends and receives."""
        return RankReshard(
            send_counts=self.traffic[rank].tolist(),
            recv_counts=self.traffic[:, rank].tolist(),
            send_order=np.argsort(self.owner[self.maker == rank], kind="stable"),
            # Makers ascend with the row, so row order is arrival order.
            slots=self.slot[self.owner == rank],
            moved=self.moved,
        )

    @cached_property
    def traffic(self) -> np.ndarray:
        """Tokens from each maker to each owner, int64 [E, E]."""
        pairs = self.maker * self.encoders + self.owner
        return np.bincount(pairs, minlength=self.encoders**2).reshape(self.encoders, self.encoders)

    @property
    def moved(self) -> int:
        """Visual tokens that change rank: the lower bound of what any exchange must send."""
        return int(self.traffic.sum() - np.trace(self.traffic))


def plan_reshard(
    cu_seqlens: np.ndarray,
    frame_starts: np.ndarray,
    frame_tokens: Sequence[int],
    frame_costs: Sequence[int],
    cp: int,
    tp: int,
) -> ReshardPlan:
    """The exchange of one row over the tp*cp ranks of its block."""
    boundaries = deal_frames(frame_costs, cp * tp)
    tokens = np.asarray(frame_tokens, dtype=np.int64)
    places = _ranges(np.asarray(frame_starts, dtype=np.int64), tokens)
    maker = np.repeat(frame_owner(boundaries), tokens)
    owner, slot = owners(cu_seqlens, cp, tp, places)
    return ReshardPlan(encoders=cp * tp, boundaries=boundaries, maker=maker, owner=owner, slot=slot)


def _chunks(cu_seqlens: np.ndarray, parts: int) -> np.ndarray:
    lengths = np.diff(cu_seqlens)
    if (lengths % (2 * parts)).any():
        bad = int(np.flatnonzero(lengths % (2 * parts))[0])
        raise ValueError(
            f"document {bad} has {int(lengths[bad])} tokens, not a multiple of {2 * parts}: a zigzag over {parts} ranks "
            f"cuts it into {2 * parts} equal chunks; pack the row with document_multiple={2 * parts}"
        )
    return lengths // (2 * parts)


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenation of ``arange(begin, begin + size)``."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    values: np.ndarray = np.arange(total, dtype=np.int64) + np.repeat(begins - (ends - sizes), sizes)
    return values

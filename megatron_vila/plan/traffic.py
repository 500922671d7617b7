"""Bytes that travel for one micro-batch inside the block of one data-parallel replica. Pure arithmetic.

Every function returns ``bytes_EE``: int64 [E, E], what encoder e (row) sends to encoder f (column) in one call; the diagonal,
which never travels, is zero. Collectives are counted as the pieces that must move, not as an algorithm of the library.

Legend: E = tp*cp ranks of a block and pipeline stage (tp fastest, then ulysses, then ring), S tokens of the padded row,
H query heads and K key/value heads of a tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_vila.config.schema import LanguageConfig
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.sizes import head_dim
from megatron_vila.plan.tokens import FRONT, ReshardPlan, ring_step


@dataclass(frozen=True)
class Links:
    """Bytes of one exchange by link: all that stay inside nodes, all that cross nodes, and the most that one rank sends."""

    inside_nodes: int
    between_nodes: int
    most_sent_by_a_rank: int

    @classmethod
    def of(cls, bytes_EE: np.ndarray, nodes_E: np.ndarray) -> Links:
        """``nodes_E`` tells the node of each encoder."""
        same = nodes_E[:, None] == nodes_E[None, :]
        return cls(int(bytes_EE[same].sum()), int(bytes_EE[~same].sum()), int(bytes_EE.sum(axis=1).max()))


def block_ranks(grid: GridShape, dp: int = 0, pp: int = 0) -> list[int]:
    """Global rank of each encoder of replica ``dp`` on stage ``pp``."""
    first = grid.rank(dp=dp, pp=pp)
    ranks = grid.group("tp_cp", first)
    return sorted(ranks, key=grid.encoder_rank)


def head_split(grid: GridShape, llm: LanguageConfig) -> HeadSplit:
    """Heads of one tensor-parallel rank over its Ulysses group; Megatron-Core repeats K/V heads that are fewer than tp."""
    return HeadSplit(llm.num_heads // grid.tp, max(llm.num_kv_heads // grid.tp, 1), grid.ulysses)


def reshard_bytes(plan: ReshardPlan, hidden_size: int, element: int) -> np.ndarray:
    """Stage 2, forward; the backward pass sends the transpose."""
    moved = plan.traffic * hidden_size * element
    return moved - np.diag(np.diag(moved))


def ulysses_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's head all-to-alls, forward (q, k, v there; output back) and backward (dout there; dq, dk, dv back)."""
    split, d = head_split(grid, llm), head_dim(llm)
    tokens = row_tokens // grid.cp
    forward, backward = _zeros(grid), _zeros(grid)
    for e, f in _pairs(grid, same=("tp", "ring")):
        mine, theirs = len(split.kv_range(_place(grid, e).ulysses)), len(split.kv_range(_place(grid, f).ulysses))
        forward[e, f] = tokens * d * element * (2 * split.per_rank + 2 * theirs)
        backward[e, f] = tokens * d * element * (2 * split.per_rank + 2 * mine)
    return forward, backward


def ring_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's ring, forward (K, V) and backward (K, V again; dK, dV home)."""
    split, d = head_split(grid, llm), head_dim(llm)
    tokens = row_tokens // grid.ring
    forward, home = _zeros(grid), _zeros(grid)
    for e, f in _pairs(grid, same=("tp", "ulysses")):
        sender, receiver = _place(grid, e), _place(grid, f)
        step = (receiver.ring - sender.ring) % grid.ring
        seen = tokens // 2 if ring_step(grid.ring, receiver.ring, step).keys == FRONT else tokens
        size = 2 * seen * len(split.kv_range(sender.ulysses)) * d * element
        forward[e, f] = size
        home[f, e] = size
    return forward, forward + home


def tensor_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's Megatron sequence parallelism, forward (2 all-gathers, 2 reduce-scatters) and backward (the same and 2
    all-gathers of the saved inputs). Where K/V heads are fewer than tp, Megatron-Core gathers the joint projection too."""
    forward, backward = _zeros(grid), _zeros(grid)
    slice_bytes = row_tokens // (grid.cp * grid.tp) * llm.hidden_size * element
    joint = 0
    if llm.num_kv_heads < grid.tp:
        rows = (llm.num_heads + 2 * llm.num_kv_heads) * head_dim(llm)
        joint = row_tokens // grid.cp * (rows // grid.tp) * element
    for e, f in _pairs(grid, same=("ulysses", "ring")):
        forward[e, f] = 4 * slice_bytes + joint
        backward[e, f] = 6 * slice_bytes + joint
    return forward, backward


def _zeros(grid: GridShape) -> np.ndarray:
    return np.zeros((grid.encoders, grid.encoders), dtype=np.int64)


def _place(grid: GridShape, encoder: int):
    return grid.coordinates(encoder)


def _pairs(grid: GridShape, same: tuple[str, ...]):
    """Pairs of different encoders that agree on the axes ``same``."""
    places = [_place(grid, e) for e in range(grid.encoders)]
    for e, mine in enumerate(places):
        for f, theirs in enumerate(places):
            if e != f and all(getattr(mine, axis) == getattr(theirs, axis) for axis in same):
                yield e, f

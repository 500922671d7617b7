"""Bytes that travel for one micro-batch inside the block of one data-parallel replica. Pure arithmetic.

Every exchange is told as ``Sent``: what the members of its groups send to each other in one call. Collectives are counted as the
pieces that must move, not as an algorithm of the library.

Legend: E = tp*cp ranks of a block and pipeline stage (tp fastest, then ulysses, then ring), G groups of N of them; in a group of
one axis N is T (tp), U (ulysses) or R (ring).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_vila.config.schema import LanguageConfig
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.heads import HeadSplit
from megatron_vila.plan.sizes import head_dim
from megatron_vila.plan.tokens import ReshardPlan


class Sent(NamedTuple):
    """``members_GN``: the encoders of each group. ``bytes_GNN``: int64, what a member (row) sends to another (column) of its
    group; zero on the diagonal, which never travels. A G of 1 stands for all groups."""

    members_GN: np.ndarray
    bytes_GNN: np.ndarray

    def matrix(self) -> np.ndarray:
        """int64 [E, E]: what each encoder (row) sends to each other one."""
        bytes_EE = np.zeros((self.members_GN.size, self.members_GN.size), dtype=np.int64)
        bytes_EE[self.members_GN[:, :, None], self.members_GN[:, None, :]] = self.bytes_GNN
        return bytes_EE


class Links(NamedTuple):
    """Bytes of one exchange by link: all that stay inside nodes, all that cross nodes, and the most that one rank sends."""

    inside_nodes: int
    between_nodes: int
    most_sent_by_a_rank: int

    @classmethod
    def of(cls, sent: Sent, nodes_E: np.ndarray) -> Links:
        """``nodes_E`` tells the node of each encoder."""
        nodes_GN = nodes_E[sent.members_GN]
        same_GNN = nodes_GN[:, :, None] == nodes_GN[:, None, :]
        inside, groups = int((sent.bytes_GNN * same_GNN).sum()), len(nodes_GN) // len(sent.bytes_GNN)
        return cls(inside, groups * int(sent.bytes_GNN.sum()) - inside, int(sent.bytes_GNN.sum(axis=2).max()))


def block_ranks(grid: GridShape, dp: int = 0, pp: int = 0) -> list[int]:
    """Global rank of each encoder of replica ``dp`` on stage ``pp``."""
    first = grid.rank(dp=dp, pp=pp)
    # Encoders are numbered as ranks are: tp, ulysses and ring are the innermost axes of the grid.
    return list(range(first, first + grid.encoders))


def head_split(grid: GridShape, llm: LanguageConfig) -> HeadSplit:
    """Heads of one tensor-parallel rank over its Ulysses group; Megatron-Core repeats K/V heads that are fewer than tp."""
    return HeadSplit(llm.num_heads // grid.tp, max(llm.num_kv_heads // grid.tp, 1), grid.ulysses)


def reshard_bytes(plan: ReshardPlan, hidden_size: int, element: int) -> tuple[Sent, Sent]:
    """Stage 2, forward and backward."""
    everyone = np.arange(plan.encoders)[None]
    moved_EE = _off_diagonal(plan.traffic * (hidden_size * element))
    return Sent(everyone, moved_EE[None]), Sent(everyone, moved_EE.T[None])


def ulysses_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[Sent, Sent]:
    """One layer's head all-to-alls, forward (q, k, v there; output back) and backward (dout there; dq, dk, dv back)."""
    split, members = head_split(grid, llm), _groups(grid, "ulysses")
    a_head = row_tokens // grid.cp * head_dim(llm) * element
    kv_U = np.array([len(split.kv_range(u)) for u in range(grid.ulysses)], dtype=np.int64)
    to_heads_UU = np.broadcast_to(a_head * (2 * split.per_rank + 2 * kv_U), (grid.ulysses, grid.ulysses))
    forward, backward = (Sent(members, _off_diagonal(bytes_UU)[None]) for bytes_UU in (to_heads_UU, to_heads_UU.T))
    return forward, backward


def ring_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[Sent, Sent]:
    """One layer's ring, forward (K, V) and backward (K, V again; dK, dV home)."""
    split, ring, members = head_split(grid, llm), np.arange(grid.ring), _groups(grid, "ring")
    sender, receiver = ring[:, None], ring[None, :]
    tokens = row_tokens // grid.ring
    # Of keys from behind the receiver's queries it needs the front half (``tokens.ring_step``).
    seen_RR = _off_diagonal(np.where(sender < receiver, tokens // 2, tokens))
    kv_U = np.array([len(split.kv_range(u)) for u in range(grid.ulysses)], dtype=np.int64)
    kv_G = kv_U[members[:, 0] // grid.tp % grid.ulysses]
    forward = 2 * head_dim(llm) * element * kv_G[:, None, None] * seen_RR
    return Sent(members, forward), Sent(members, forward + forward.swapaxes(1, 2))


def tensor_bytes(grid: GridShape, llm: LanguageConfig, row_tokens: int, element: int) -> tuple[Sent, Sent]:
    """One layer's Megatron sequence parallelism, forward (2 all-gathers, 2 reduce-scatters) and backward (the same and 2
    all-gathers of the saved inputs). Where K/V heads are fewer than tp, Megatron-Core gathers the joint projection too."""
    a_slice = row_tokens // (grid.cp * grid.tp) * llm.hidden_size * element
    joint = 0
    if llm.num_kv_heads < grid.tp:
        rows = (llm.num_heads + 2 * llm.num_kv_heads) * head_dim(llm)
        joint = row_tokens // grid.cp * (rows // grid.tp) * element
    members, shape_TT = _groups(grid, "tp"), (grid.tp, grid.tp)
    sizes = (4 * a_slice + joint, 6 * a_slice + joint)
    forward, backward = (Sent(members, _off_diagonal(np.full(shape_TT, size, dtype=np.int64))[None]) for size in sizes)
    return forward, backward


def _groups(grid: GridShape, axis: str) -> np.ndarray:
    """Encoders of each group along ``axis`` (tp, ulysses or ring), int64 [G, N]."""
    encoders = np.arange(grid.encoders).reshape(grid.ring, grid.ulysses, grid.tp)
    return np.moveaxis(encoders, ("ring", "ulysses", "tp").index(axis), -1).reshape(-1, getattr(grid, axis))


def _off_diagonal(bytes_NN: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(bytes_NN), dtype=bool), 0, bytes_NN)

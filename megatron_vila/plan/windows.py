"""Sliding-window attention as blocks that plain and causal attention kernels can compute, exactly.

With a window of W a token attends to itself and the W - 1 tokens before it. On the grid of queries and keys that is a band. Its
lower edge is that of causal attention. Its upper edge is that of causal attention too, if queries and keys are both read
backward: key j >= query i. So the band is cut into causal squares, squares that are causal backward, and rectangles in between.

Legend: D documents, c tokens of a zigzag chunk of a document, W window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vila.plan.tokens import ALL, FRONT, ring_step


@dataclass(frozen=True)
class WindowPart:
    """Blocks of one step of the ring that one call of a kernel computes; no query is in two of them.

    ``queries`` and ``keys`` int64 are the indices, among the queries and keys of the step, of the tokens that go into the call:
    block after block, ``lengths_q`` queries and ``lengths_k`` keys of each.
    """

    queries: np.ndarray
    keys: np.ndarray
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    causal: bool


@dataclass(frozen=True)
class _Block:
    """Queries ``first_q`` on and keys ``first_k`` on of a pair of chunks."""

    first_q: int
    queries: int
    first_k: int
    keys: int
    kind: str  # causal, backward or whole


def window_parts(lengths: tuple[int, ...], ring: int, rank: int, source: int, window: int) -> list[WindowPart]:
    """The blocks that ring rank ``rank`` computes with the keys of rank ``source``.

    ``lengths`` are the tokens of each document on a ring rank: its front chunk, then its back chunk (``plan/tokens.py``).
    """
    step = ring_step(ring, rank, (rank - source) % ring)
    query_chunks = (rank, 2 * ring - 1 - rank) if step.queries == ALL else (2 * ring - 1 - rank,)
    key_chunks = (source,) if step.keys == FRONT else (source, 2 * ring - 1 - source)
    # A query is in one block of each kind for each chunk of keys.
    parts = defaultdict(list)
    first_q = first_k = 0
    for length in lengths:
        size = length // 2
        for half_q, query_chunk in enumerate(query_chunks):
            for half_k, key_chunk in enumerate(key_chunks):
                for block in _blocks((query_chunk - key_chunk) * size, size, window):
                    start_q, start_k = first_q + half_q * size + block.first_q, first_k + half_k * size + block.first_k
                    parts[half_k, block.kind].append((start_q, block.queries, start_k, block.keys))
        first_q += len(query_chunks) * size
        first_k += len(key_chunks) * size
    return [_part(kind, blocks) for (_, kind), blocks in parts.items()]


def _part(kind: str, blocks: list[tuple[int, int, int, int]]) -> WindowPart:
    step = -1 if kind == "backward" else 1
    queries = np.concatenate([np.arange(first_q, first_q + n)[::step] for first_q, n, _, _ in blocks])
    keys = np.concatenate([np.arange(first_k, first_k + m)[::step] for _, _, first_k, m in blocks])
    lengths_q, lengths_k = tuple(block[1] for block in blocks), tuple(block[3] for block in blocks)
    return WindowPart(queries, keys, lengths_q, lengths_k, kind != "whole")


def _blocks(distance: int, size: int, window: int) -> Iterator[_Block]:
    """Blocks of a pair of chunks of ``size`` tokens, where the queries begin ``distance`` tokens after the keys."""
    if size == 0 or distance < 0:
        return
    if distance > 0:
        yield from _upper_edge(0, size, 0, size, distance - window + 1)
        return
    for first in range(0, size, window):
        count = min(window, size - first)
        yield _Block(first, count, first, count, "causal")
        if first:
            yield from _upper_edge(first, count, first - window, window, 1)


def _upper_edge(first_q: int, queries: int, first_k: int, keys: int, offset: int) -> Iterator[_Block]:
    """Blocks of a rectangle in which query i attends to keys j >= i + offset, both counted from the rectangle's corner."""
    if offset < 0:
        sees_all = min(-offset, queries)
        yield _Block(first_q, sees_all, first_k, keys, "whole")
        first_q, queries = first_q + sees_all, queries - sees_all
    else:
        first_k, keys = first_k + offset, keys - offset
    square = min(queries, keys)
    if square > 0:
        yield _Block(first_q, square, first_k, square, "backward")
        if keys > square:
            yield _Block(first_q, square, first_k + square, keys - square, "whole")

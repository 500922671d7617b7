"""A long document in chunks, which inference runs through the model one after the other.

A border never cuts the places of a unit (``plan/pictures.py``), so that each unit is encoded with the chunk that holds its
tokens. Chunks are filled from the start: the same beginning of two documents is cut alike.

Legend: L tokens of a document, F units of it, S tokens of a chunk's row (with padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import Document, Row, pack

TOKENS_PER_RANK = 8192
"""Tokens of a chunk for each rank of the block: enough work for a GPU's matrix products."""


@dataclass(frozen=True)
class Chunk:
    """The tokens from ``first`` to before ``stop`` of a document; ``frames`` are the units whose tokens these are."""

    first: int
    stop: int
    frames: range

    def __len__(self) -> int:
        return self.stop - self.first


def tokens_of_chunk(chunk_tokens: int, grid: GridShape) -> int:
    """Most tokens of a chunk: ``chunk_tokens``, or (0) ``TOKENS_PER_RANK`` for each rank of the block.

    Raises ``ValueError`` for a negative number.
    """
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1 (0: {TOKENS_PER_RANK} for each rank)")
    return chunk_tokens or TOKENS_PER_RANK * grid.cp * grid.tp


def prefix_tokens(document: Document) -> int:
    """Tokens up to the end of the last unit, which questions about the same media share; 0 without media."""
    return int(document.frame_starts[-1]) + document.frames[-1].tokens if document.frames else 0


def cut(document: Document, chunk_tokens: int, first: int = 0, stop: int | None = None) -> tuple[Chunk, ...]:
    """Chunks of at most ``chunk_tokens`` tokens of the places from ``first`` to before ``stop`` (None: the end); a unit with more
    is a chunk of its own. Empty if there is no token between.

    Raises ``ValueError`` for ``chunk_tokens`` < 1, for places outside the document and for borders inside a unit.
    """
    stop = len(document) if stop is None else stop
    if chunk_tokens < 1 or not 0 <= first <= stop <= len(document):
        raise ValueError(f"chunks of {chunk_tokens} tokens cannot be cut from {first} to {stop} of {len(document)} tokens")
    starts = document.frame_starts
    ends = starts + np.array([frame.tokens for frame in document.frames], dtype=np.int64)
    for border in (first, stop):
        if _inside(border, starts, ends) is not None:
            raise ValueError(f"place {border} lies inside the tokens of a unit, which are encoded together")
    chunks = []
    while first < stop:
        border = min(first + chunk_tokens, stop)
        unit = _inside(border, starts, ends)
        if unit is not None:
            border = int(starts[unit]) if starts[unit] > first else int(ends[unit])
        inside = range(int(np.searchsorted(starts, first)), int(np.searchsorted(starts, border)))
        chunks.append(Chunk(first, border, inside))
        first = border
    return tuple(chunks)


def _inside(border: int, starts: np.ndarray, ends: np.ndarray) -> int | None:
    """The unit whose tokens a border would part, None if there is none."""
    unit = int(np.searchsorted(starts, border, side="right")) - 1
    return unit if unit >= 0 and starts[unit] < border < ends[unit] else None


def part(document: Document, chunk: Chunk) -> Document:
    """The tokens and units of ``chunk`` as a document of their own; one with all units still tells the media apart."""
    taken = slice(chunk.frames.start, chunk.frames.stop)
    return replace(
        document,
        token_ids=document.token_ids[chunk.first : chunk.stop],
        labels=document.labels[chunk.first : chunk.stop],
        frames=document.frames[taken],
        frame_starts=document.frame_starts[taken] - chunk.first,
        media=document.media if len(chunk.frames) == len(document.frames) else (),
    )


def row_of(parts: Sequence[Document], firsts: Sequence[int], grid: GridShape) -> Row:
    """A row of ``parts``, packed for ``grid``, whose tokens stand from ``firsts`` on in their sequences: ``positions`` count from
    there. Raises as ``pack``."""
    row = pack(parts, grid.document_multiple, grid.row_multiple)
    shift = np.repeat(np.asarray(firsts, dtype=np.int64), np.diff(row.cu_seqlens))
    return replace(row, positions=row.positions + shift)

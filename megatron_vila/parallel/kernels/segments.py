"""Packed rows: which query tokens attend to which key tokens, as lengths that the host knows.

A row is a series of segments. Query segment i attends to key segment i and to nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch


class Bounds(NamedTuple):
    """Token ranges of one segment: queries ``q`` and keys ``k``."""

    q: slice
    k: slice


@dataclass(frozen=True)
class Segments:
    """Lengths in tokens of the segments of a row. A segment may have no queries, no keys, or neither."""

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    _on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.lengths_q) != len(self.lengths_k):
            raise ValueError(
                f"{len(self.lengths_q)} query segments do not pair with {len(self.lengths_k)} key segments"
            )

    @cached_property
    def tokens_q(self) -> int:
        return sum(self.lengths_q)

    @cached_property
    def tokens_k(self) -> int:
        return sum(self.lengths_k)

    @cached_property
    def max_q(self) -> int:
        return max(self.lengths_q, default=0)

    @cached_property
    def max_k(self) -> int:
        return max(self.lengths_k, default=0)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of each segment."""
        return tuple(zip(self.lengths_q, self.lengths_k, strict=True))

    @cached_property
    def uniform(self) -> bool:
        """All segments have the same shape: the row is a plain batch [segments, length, heads, D]."""
        return len(set(self.pairs)) == 1

    @cached_property
    def bounds(self) -> tuple[Bounds, ...]:
        ends = zip(accumulate(self.lengths_q), accumulate(self.lengths_k), strict=True)
        return tuple(Bounds(slice(q - n, q), slice(k - m, k)) for (q, k), (n, m) in zip(ends, self.pairs, strict=True))

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cumulative lengths of queries and keys, int32 [segments + 1] each; made once per device, without waiting."""
        if device not in self._on_device:
            # Only a copy from pinned memory leaves the host running.
            queries, keys = (
                torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda").to(
                    device, non_blocking=True
                )
                for lengths in (self.lengths_q, self.lengths_k)
            )
            self._on_device[device] = queries, keys
        return self._on_device[device]

    def choose(self, wanted: list[int]) -> Choice:
        """The segments with these indices as a row of their own."""
        return Choice(
            Segments(tuple(self.lengths_q[i] for i in wanted), tuple(self.lengths_k[i] for i in wanted)),
            tuple(self.bounds[i].q for i in wanted),
            tuple(self.bounds[i].k for i in wanted),
        )

    @cached_property
    def filled(self) -> Choice:
        """The segments that have queries and keys."""
        return self.choose([i for i, pair in enumerate(self.pairs) if all(pair)])


@dataclass(frozen=True)
class Choice:
    """Some segments of a row, and where their tokens stand in it."""

    segments: Segments
    ranges_q: tuple[slice, ...]
    ranges_k: tuple[slice, ...]


def take(x: torch.Tensor, ranges: tuple[slice, ...], dim: int = 0) -> torch.Tensor:
    """The tokens of at least one range of ``x`` along ``dim``; a view if it is one."""
    parts = [x.narrow(dim, r.start, r.stop - r.start) for r in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put(total: torch.Tensor, ranges: tuple[slice, ...], x: torch.Tensor, dim: int = 0) -> None:
    """Write ``x`` to the tokens of ``ranges`` of ``total`` along ``dim``."""
    parts = x.split([r.stop - r.start for r in ranges], dim)
    for r, part in zip(ranges, parts, strict=True):
        total.narrow(dim, r.start, r.stop - r.start).copy_(part)

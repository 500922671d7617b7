"""Keys and values of the tokens that a model has read, kept for the tokens that follow.

A sequence is a chain of spans. Each holds this rank's part of consecutive tokens: those of its ring rank, and of them the
key/value heads that its Ulysses rank needs. Sequences that begin alike share their first spans.

Legend: L layers, U tokens that there is room for, n tokens, K key/value heads of this rank, D head dim, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_vila.plan.cache_memory import FP8_BLOCK_TOKENS

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class SpanShape:
    """``kv_heads`` are those that this rank keeps."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that a token takes in all layers."""
        scale = 4 if dtype == FP8 else 0
        return 2 * self.layers * self.kv_heads * (self.head_dim * dtype.itemsize + scale)


@dataclass
class Span:
    """Consecutive tokens of one sequence on this rank.

    ``k`` and ``v`` [L, U, K, D]; in fp8 (e4m3) ``k_scale`` and ``v_scale`` float32 [L, U, K] multiply them. ``device_length``
    int32 [1] is the number of tokens kept, for kernels that read it on the device. ``positions`` int64 [length] (host) are their
    positions in the sequence, in the order in which they are stored.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    device_length: torch.Tensor
    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def empty(cls, shape: SpanShape, capacity: int, dtype: torch.dtype, device: torch.device) -> Span:
        return Tails.empty(shape, 1, capacity, dtype, device).spans[0]

    @property
    def length(self) -> int:
        return len(self.positions)

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are kept."""
        tensors = (x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None)
        return sum(x[:, : self.length].nbytes for x in tensors)

    def write(self, layer: int, k_nKD: torch.Tensor, v_nKD: torch.Tensor) -> None:
        """Put the n tokens after those that are kept. They count once all layers have written and ``commit`` is called."""
        place = slice(self.length, self.length + len(k_nKD))
        for stored, scale, x in ((self.k, self.k_scale, k_nKD), (self.v, self.v_scale, v_nKD)):
            if scale is None:
                stored[layer, place] = x
            else:
                stored[layer, place], scale[layer, place] = quantized(x)

    def commit(self, positions: np.ndarray) -> None:
        """Count the tokens that were written as kept."""
        if self.length + len(positions) > self.capacity:
            raise ValueError(f"a span of {self.capacity} tokens has {self.length} and gets {len(positions)} more")
        self.positions = np.concatenate([self.positions, positions])
        self.device_length.fill_(self.length)

    def shorten(self, length: int) -> None:
        """Keep the first ``length`` tokens; what follows is written over them."""
        self.positions = self.positions[:length]
        self.device_length.fill_(length)

    def blocks(self, layer: int, dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [n, K, D] of all kept tokens in ``dtype``: one view if they are kept so, else copies block by block."""
        whole = self.k_scale is None and self.k.dtype == dtype
        step = max(1, self.length) if whole else FP8_BLOCK_TOKENS
        for first in range(0, self.length, step):
            yield self.read(layer, first, min(first + step, self.length), dtype)

    def read(self, layer: int, first: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [stop - first, K, D] of some tokens in ``dtype``."""
        place = slice(first, stop)
        if self.k_scale is None or self.v_scale is None:
            return self.k[layer, place].to(dtype), self.v[layer, place].to(dtype)
        pairs = (self.k, self.k_scale), (self.v, self.v_scale)
        k, v = (restored(stored[layer, place], scale[layer, place], dtype) for stored, scale in pairs)
        return k, v


@dataclass
class Tails:
    """The last spans of the B sequences of a batch, in tensors [L, B, U, K, D] that a decoding step writes at once.

    The last place of each is left for what a rank computes and another one keeps.
    """

    spans: tuple[Span, ...]
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    lengths_B: torch.Tensor

    @classmethod
    def empty(cls, shape: SpanShape, rows: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Tails:
        size = shape.layers, rows, capacity, shape.kv_heads, shape.head_dim
        k, v = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        lengths_B = torch.zeros(rows, dtype=torch.int32, device=device)
        k_scale = v_scale = None
        if dtype == FP8:
            k_scale, v_scale = (torch.empty(size[:-1], dtype=torch.float32, device=device) for _ in range(2))

        def part(x: torch.Tensor | None, row: int) -> torch.Tensor | None:
            return None if x is None else x[:, row]

        spans = tuple(
            Span(k[:, b], v[:, b], part(k_scale, b), part(v_scale, b), lengths_B[b : b + 1]) for b in range(rows)
        )
        return cls(spans, k, v, k_scale, v_scale, lengths_B)

    def places(self, keeps_B: torch.Tensor) -> torch.Tensor:
        """Where the next token of each row is written, int64 [B], for ``write``; ``keeps_B`` says in which rows this rank keeps
        it. Counts it as kept there. On the device alone."""
        rows, capacity = self.k.shape[1:3]
        first_B = torch.arange(rows, device=keeps_B.device) * capacity
        places_B = first_B + torch.where(keeps_B, self.lengths_B, capacity - 1)
        self.lengths_B += keeps_B
        return places_B

    def write(self, layer: int, places_B: torch.Tensor, k_BKD: torch.Tensor, v_BKD: torch.Tensor) -> None:
        for stored, scale, x in ((self.k, self.k_scale, k_BKD), (self.v, self.v_scale, v_BKD)):
            if scale is not None:
                x, scale_BK = quantized(x)
                scale[layer].flatten(0, 1).index_copy_(0, places_B, scale_BK)
            # fp8 has no index_copy_ everywhere; its bytes have.
            whole = stored[layer].flatten(0, 1)
            if scale is not None:
                whole, x = whole.view(torch.uint8), x.view(torch.uint8)
            whole.index_copy_(0, places_B, x.to(whole.dtype))


def quantized(x_nKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 [n, K, D] and the float32 scale [n, K] of each token and head, whose largest number becomes the largest of fp8."""
    wide_nKD = x_nKD.float()
    scale_nK = (wide_nKD.abs().amax(-1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide_nKD / scale_nK[..., None]).to(FP8), scale_nK


def restored(x_nKD: torch.Tensor, scale_nK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What ``quantized`` was given, rounded."""
    return (x_nKD.float() * scale_nK[..., None]).to(dtype)

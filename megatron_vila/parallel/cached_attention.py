"""Attention to what was read before: keys and values that lie on the ranks of a (ulysses x ring) group, and stay there.

Queries travel. Those of a chunk go to all ranks of the ring; each attends to the keys and values that it keeps, sends back its
outputs with their log-sum-exp, and parts merge in float32 at least. A chunk of prefill adds the causal attention of its own
tokens, by the ring as in training. A decoded token is computed by all ranks alike, so its queries are everywhere already.

Knows neither Megatron-Core nor Transformers; the adapters to both use it (``generate/runner.py``, ``hf/mm_sp``).

Legend: s local tokens of a chunk, T = U*s tokens of a ring rank after the Ulysses exchange, H query heads and K key/value heads
of a tensor-parallel rank, h and k those of a Ulysses rank, R ring ranks, B decoded tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.parallel.attention2d import Attention2D, RowIndices
from megatron_vila.parallel.cache import Span, SpanShape, Tails
from megatron_vila.parallel.kernels import Segments
from megatron_vila.parallel.kernels.decode import Cached, attend_cached
from megatron_vila.parallel.ring import merge
from megatron_vila.plan.tokens import local_positions

QUERIES = 4096
"""Queries of a call: with fa4 on an H200 against 128K, 512K and 1.18M keys, 16K at once took 13, 2 and 7 % longer each."""


class Observer(Protocol):
    """Looks on while a chunk of one document is read."""

    def begin_chunk(self, cu_seqlens: np.ndarray, length: int, earlier: int) -> None:
        """Before the layers, alike on all ranks: the chunk's bounds with padding, its tokens without, and those before it."""

    def on_queries(self, layer: int, q_ThD: torch.Tensor, lse_hT: torch.Tensor) -> None:
        """In each layer: the rotated queries of this ring rank's tokens (padding too) for the heads of this Ulysses rank, and
        their log-sum-exp over all keys of the sequence, on whichever rank."""


@dataclass(frozen=True)
class ChunkDocument:
    """A document of a chunk: ``before`` holds all its tokens that were read ``earlier`` (their number in the whole sequence, on
    all ranks), and the first ``kept`` of its tokens on this ring rank, which are no padding, go into ``into``."""

    before: tuple[Span, ...]
    into: Span
    earlier: int
    kept: int


def kept_positions(cu_seqlens: np.ndarray, lengths: Sequence[int], ring: int, ring_rank: int) -> list[np.ndarray]:
    """For each document of a row the positions in it of the tokens that a ring rank keeps, int64, ascending; padding left out.

    ``cu_seqlens`` int64 [documents + 1] are boundaries with padding, ``lengths`` the documents' tokens without.
    """
    mine = local_positions(cu_seqlens, ring, ring_rank)
    parts = np.split(mine, cu_seqlens[1:-1] // ring)
    return [
        part[part - start < length] - start for part, start, length in zip(parts, cu_seqlens, lengths, strict=False)
    ]


@dataclass(frozen=True)
class CachedAttention:
    """``attention`` of one layer's shape; all layers may share it. Its heads travel in one chunk. Forward only."""

    attention: Attention2D

    def __post_init__(self) -> None:
        if self.attention.ulysses.split.chunks != 1:
            raise ValueError("keys and values are cached with parallel.ulysses_chunks=1")

    def span_shape(self, layers: int, head_dim: int) -> SpanShape:
        """What a span of this rank keeps."""
        ulysses, expansion = self.attention.ulysses, self.attention.expansion
        heads = len(ulysses.split.kv_range(ulysses.rank)) if expansion is None else len(expansion)
        return SpanShape(layers, heads, head_dim)

    def chunk(
        self,
        q_sHD: torch.Tensor,
        k_sKD: torch.Tensor,
        v_sKD: torch.Tensor,
        row: RowIndices,
        documents: Sequence[ChunkDocument],
        layer: int,
        observer: Observer | None = None,
    ) -> torch.Tensor:
        """Attention of a chunk's tokens to themselves (causal) and to all before them: [s, H, D] to [s, H, D].

        Writes the keys and values of ``layer`` into the documents' spans. All-to-all over the Ulysses group, the ring's
        point-to-point, and where tokens were read earlier an all-gather and an all-to-all over the ring group.
        """
        ulysses, ring = self.attention.ulysses, self.attention.ring
        q_ThD, k_TkD, v_TkD = ulysses.to_heads(q_sHD, k_sKD, v_sKD, row.order, 0).wait()
        out_ThD, lse_hT = ring.forward(q_ThD, k_TkD, v_TkD, row.layout, self.attention.expansion)
        if any(document.earlier for document in documents):
            out_ThD = self._with_earlier(q_ThD, out_ThD, lse_hT, row, documents, layer)
        if observer is not None:
            observer.on_queries(layer, q_ThD, lse_hT)
        k_TkD, v_TkD = self._as_kernels_get(k_TkD), self._as_kernels_get(v_TkD)
        for document, bounds in zip(documents, row.layout.whole.bounds, strict=True):
            place = slice(bounds.k.start, bounds.k.start + document.kept)
            document.into.write(layer, k_TkD[place], v_TkD[place])
        if ulysses.split.ulysses == 1:
            return out_ThD
        out_sHD = torch.empty_like(q_sHD)
        ulysses.to_sequence(out_ThD, row.inverse, out_sHD, 0).wait()
        return out_sHD

    def token(
        self,
        q_BHD: torch.Tensor,
        k_BKD: torch.Tensor,
        v_BKD: torch.Tensor,
        tails: Tails,
        places_B: torch.Tensor,
        shared: Sequence[tuple[Span, tuple[int, ...]]],
        layer: int,
    ) -> torch.Tensor:
        """Attention of one new token of each of B sequences, the same on all ranks: [B, H, D] to [B, H, D].

        ``places_B`` is ``tails.places`` of this step. ``shared`` are the spans before the tails and the rows of the batch that
        see each. Host and device do not wait for each other; all-gather over the ring and the Ulysses group.
        """
        ulysses = self.attention.ulysses
        heads, kv_heads = ulysses.split.query_range(ulysses.rank, 0), ulysses.split.kv_range(ulysses.rank)
        k_BkD, v_BkD = (self._as_kernels_get(x[:, kv_heads.start : kv_heads.stop]) for x in (k_BKD, v_BKD))
        tails.write(layer, places_B, k_BkD, v_BkD)
        own = [(span, (row,)) for row, span in enumerate(tails.spans)]
        parts = [(_cached(span, layer), rows) for span, rows in (*shared, *own)]
        q_BhD = q_BHD[:, heads.start : heads.stop]
        out_BhD, lse_hB = attend_cached(q_BhD, parts, self.attention.ring.scale)
        out_BhD = self._merged_over_ring(out_BhD, lse_hB).to(q_BHD.dtype)
        if ulysses.split.ulysses == 1:
            return out_BhD
        everyone = _all_gathered(out_BhD.contiguous(), ulysses.split.ulysses, ulysses.group)
        return everyone.transpose(0, 1).flatten(1, 2)

    def _with_earlier(self, q_ThD, out_ThD, lse_hT, row: RowIndices, documents: Sequence[ChunkDocument], layer: int):
        """The output of a chunk's own tokens, and that of the spans of all ranks."""
        ring = self.attention.ring
        q_RThD = _all_gathered(q_ThD.contiguous(), ring.size, ring.group)
        out_RThD = q_RThD.new_zeros(q_RThD.shape)
        lse_RhT = lse_hT.new_full((ring.size, *lse_hT.shape), -torch.inf)
        for document, bounds in zip(documents, row.layout.whole.bounds, strict=True):
            if not document.earlier:
                continue
            q_nhD = q_RThD[:, bounds.q].flatten(0, 1)
            out_nhD, lse_hn = self.spans(q_nhD, document.before, layer)
            out_RThD[:, bounds.q] = out_nhD.view(ring.size, -1, *out_nhD.shape[1:]).to(out_RThD.dtype)
            lse_RhT[:, :, bounds.q] = lse_hn.view(lse_hn.shape[0], ring.size, -1).transpose(0, 1)
        parts = _exchanged(out_RThD, ring.size, ring.group), _exchanged(lse_RhT, ring.size, ring.group)
        if ring.size > 1:  # an output that is merged once is rounded once, without a wider copy
            out_ThD = out_ThD.to(lse_hT.dtype)
        for part_out, part_lse in zip(*parts, strict=True):
            merge(out_ThD, lse_hT, part_out, part_lse)
        return out_ThD.to(q_ThD.dtype)

    def spans(self, q_nhD: torch.Tensor, spans: Sequence[Span], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries to everything that this rank keeps in ``spans``: out [n, h, D] in the dtype of q or wider, and the
        log-sum-exp [h, n]; 0 and -inf where nothing is kept. No collective."""
        lse_dtype = torch.promote_types(q_nhD.dtype, torch.float32)
        out_nhD = q_nhD.new_zeros(q_nhD.shape)
        lse_hn = q_nhD.new_full((q_nhD.shape[1], len(q_nhD)), -torch.inf, dtype=lse_dtype)
        blocks = (block for span in spans for block in span.blocks(layer, q_nhD.dtype))
        for number, (k_UkD, v_UkD) in enumerate(blocks):
            part_out, part_lse = self._block(q_nhD, k_UkD, v_UkD)
            if number == 0:
                out_nhD, lse_hn = part_out, part_lse
            else:  # a sum of several is rounded once
                out_nhD = out_nhD.to(lse_dtype)
                merge(out_nhD, lse_hn, part_out, part_lse)
        return out_nhD, lse_hn

    def _block(
        self, q_nhD: torch.Tensor, k_UkD: torch.Tensor, v_UkD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ring = self.attention.ring
        parts = [
            ring.kernel.forward(part_q, k_UkD, v_UkD, Segments((len(part_q),), (len(k_UkD),)), False, ring.scale)
            for part_q in q_nhD.split(QUERIES)
        ]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs), torch.cat(lses, 1)

    def _merged_over_ring(self, out_BhD: torch.Tensor, lse_hB: torch.Tensor) -> torch.Tensor:
        ring = self.attention.ring
        if ring.size == 1:
            return out_BhD
        outs, lses = (_all_gathered(x.contiguous(), ring.size, ring.group) for x in (out_BhD, lse_hB))
        weights_RBh = (lses - torch.logsumexp(lses, 0)).exp().transpose(1, 2)
        return (outs * weights_RBh[..., None]).sum(0)

    def _as_kernels_get(self, x_nkD: torch.Tensor) -> torch.Tensor:
        expansion = self.attention.expansion
        return x_nkD if expansion is None else x_nkD.index_select(1, expansion)


def _cached(span: Span, layer: int) -> Cached:
    k_scale, v_scale = (None if scale is None else scale[layer] for scale in (span.k_scale, span.v_scale))
    return Cached(span.k[layer], span.v[layer], k_scale, v_scale, length=span.device_length, most=span.capacity)


def _all_gathered(x: torch.Tensor, ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """``x`` of all ranks, side by side. All-gather over ``group``."""
    if ranks == 1:
        return x[None]
    out = x.new_empty(ranks, *x.shape)
    dist.all_gather_into_tensor(out.flatten(0, 1), x, group=group)
    return out


def _exchanged(x_R: torch.Tensor, ranks: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Part r of ``x_R`` [R, ...] to rank r, and what came from all ranks in their order. All-to-all over ``group``."""
    if ranks == 1:
        return x_R
    out = torch.empty_like(x_R)
    dist.all_to_all_single(out, x_R, group=group)
    return out

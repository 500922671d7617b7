"""How much attention tokens pay to each frame: exact, in one more pass of a few tokens over the cache.

A question and its answer are read once more (``Engine.observe``) on what was read before. In each layer the queries of the wanted
tokens go to all ring ranks with their log-sum-exp over all keys; a rank adds up exp(score - log-sum-exp), the softmax, over the
keys that it keeps. One sum over all ranks at the end gives every frame its share. Memory is bounded: keys are taken in blocks.

Legend: T local tokens of a chunk, R ring ranks, n wanted tokens, m most of them on one ring rank, h query heads and K key/value
heads of this rank, D head dim, U kept tokens of a span, u those of a block, F units of frames.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.generate.engine import Engine, Prefix, Request
from megatron_vila.parallel.cache import Span
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import Document
from megatron_vila.plan.tokens import local_positions

BLOCK_SCORES = 1 << 25
"""Scores that exist at once: 128 MiB in float32."""


def frame_attention(
    engine: Engine,
    prefix: Prefix,
    question: np.ndarray,
    answer: np.ndarray,
    layers: Collection[int] | None = None,
) -> np.ndarray:
    """The share of attention that each unit of frames of ``prefix`` gets while ``answer`` is written: float64 [F].

    It is the mean over the last token of ``question`` and the tokens of ``answer`` (int64 token ids, as in a ``Request``), over
    all heads and ``layers`` (numbers from 0; None: all); text gets the rest of 1. The same on all ranks. Collective, as
    ``Engine.observe``, with an all-gather over the ring in each layer and an all-reduce over tp x cp. Raises ``ValueError`` for
    a layer that there is not.
    """
    count = prefix.span.k.shape[0]
    if layers is not None and (not layers or not set(layers) <= set(range(count))):
        raise ValueError(f"layers {sorted(layers)} are not among 0 to {count - 1}")
    tail = np.concatenate([question, answer])
    last = prefix.tokens + len(question) - 1
    seen = FrameAttention((prefix.span,), engine.topology, engine.scale, range(last, prefix.tokens + len(tail)), layers)
    engine.observe(Request(prefix, tail), seen)
    return seen.weights(prefix.document, engine.config.model.llm.num_heads)


class FrameAttention:
    """An ``Observer`` that adds up the attention which the tokens at the positions ``wanted`` pay to each token of ``spans``.

    ``wanted`` come after all tokens of ``spans``. ``scale`` multiplies the products of queries and keys.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        topology: ParallelTopology,
        scale: float,
        wanted: range,
        layers: Collection[int] | None = None,
    ) -> None:
        self._spans, self._topology, self._scale = spans, topology, scale
        self._wanted, self._layers = wanted, layers
        self._mass_U = [torch.zeros(span.length, dtype=torch.float64, device=span.k.device) for span in spans]
        self._mine_m = self._valid_n = torch.empty(0, dtype=torch.int64)
        self._rows = 0  # (token, layer) pairs that were added

    def begin_chunk(self, cu_seqlens: np.ndarray, length: int, earlier: int) -> None:
        """Find the wanted tokens of the chunk on each ring rank."""
        ring, device = self._topology.grid.ring, self._spans[0].k.device
        found = []
        for rank in range(ring):
            place_T = local_positions(cu_seqlens, ring, rank)
            position_T = place_T + earlier
            is_wanted = (place_T < length) & (position_T >= self._wanted.start) & (position_T < self._wanted.stop)
            found.append(np.flatnonzero(is_wanted))
        most = max(map(len, found))
        # All ranks gather equally many; the first token stands in for what is lacking, and is left out afterwards.
        mine_m = np.zeros(most, np.int64)
        mine = found[self._topology.place.ring]
        mine_m[: len(mine)] = mine
        valid_n = np.concatenate([rank * most + np.arange(len(places)) for rank, places in enumerate(found)])
        self._mine_m, self._valid_n = (torch.from_numpy(x).to(device) for x in (mine_m, valid_n))

    def on_queries(self, layer: int, q_ThD: torch.Tensor, lse_hT: torch.Tensor) -> None:
        """Add the attention of the chunk's wanted tokens in ``layer``. All-gather over the ring group."""
        if not len(self._valid_n) or (self._layers is not None and layer not in self._layers):
            return
        q_nhD, lse_nh = (self._from_ring(x[self._mine_m]) for x in (q_ThD, lse_hT.t()))
        dtype, wide = q_nhD.dtype, torch.promote_types(q_nhD.dtype, torch.float32)
        q_nhD, lse_nh = q_nhD.to(wide) * self._scale, lse_nh.to(wide)
        for span, mass_U in zip(self._spans, self._mass_U, strict=True):
            step = max(1, BLOCK_SCORES // lse_nh.numel())
            for first in range(0, span.length, step):
                stop = min(first + step, span.length)
                k_uKD, _ = span.read(layer, first, stop, dtype)  # rounded as attention sees them
                mass_U[first:stop] += _mass(q_nhD, lse_nh, k_uKD.to(wide))
        self._rows += len(self._valid_n)

    def weights(self, document: Document, heads: int) -> np.ndarray:
        """The share of attention of each unit of ``document``, whose tokens the spans hold: float64 [F], the mean over the
        ``heads`` query heads of the model, the wanted tokens and the layers. All-reduce over tp x cp."""
        starts, tokens = document.frame_starts, np.array([frame.tokens for frame in document.frames], np.int64)
        total_F = torch.zeros(len(starts), dtype=torch.float64, device=self._mass_U[0].device)
        for span, mass_U in zip(self._spans, self._mass_U, strict=True):
            unit_U = np.searchsorted(starts, span.positions, side="right") - 1
            is_visual = (unit_U >= 0) & (span.positions < (starts + tokens)[unit_U])
            units, places = (
                torch.from_numpy(x).to(total_F.device) for x in (unit_U[is_visual], np.flatnonzero(is_visual))
            )
            total_F.index_add_(0, units, mass_U[places])
        if self._topology.grid.encoders > 1:
            dist.all_reduce(total_F, group=self._topology.tp_cp)
        return (total_F / (max(1, self._rows) * heads)).cpu().numpy()

    def _from_ring(self, x_m: torch.Tensor) -> torch.Tensor:
        """The wanted rows of all ring ranks."""
        ring = self._topology.grid.ring
        if ring == 1:
            return x_m
        out = x_m.new_empty(ring * len(x_m), *x_m.shape[1:])
        dist.all_gather_into_tensor(out, x_m.contiguous(), group=self._topology.ring)
        return out[self._valid_n]


def _mass(q_nhD: torch.Tensor, lse_nh: torch.Tensor, k_uKD: torch.Tensor) -> torch.Tensor:
    """The softmax of all queries and heads at each key, added up: float64 [u]."""
    heads = k_uKD.shape[1]
    q_KND = q_nhD.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
    lse_KN = lse_nh.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
    scores_KNu = torch.bmm(q_KND, k_uKD.permute(1, 2, 0))
    return scores_KNu.sub_(lse_KN[..., None]).exp_().sum((0, 1), dtype=torch.float64)

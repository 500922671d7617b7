"""What every attention kernel promises, and the two base classes that keep the backends short.

The backward pass takes the output and log-sum-exp it is given. In a ring these are the merged ones over all keys of a row,
so that each block yields its exact share of the gradients (FlashAttention, arXiv 2205.14135, algorithm 4, and Ring Attention,
arXiv 2310.01889).

Legend: T query tokens, U key tokens, H query heads, K key/value heads, D head dim; B segments of one length with t queries
and u keys each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch

from megatron_vila.parallel.kernels.segments import Bounds, Choice, Segments, put, take


class AttentionKernel(Protocol):
    """Softmax attention of packed segments, forward and backward, outside autograd.

    Neither pass waits for the device. ``causal`` needs as many queries as keys in each segment. H is a multiple of K: query
    head h uses key/value head h // (H / K). Inputs may be strided. Wrong shapes raise ``ValueError``.
    """

    name: str

    def forward(
        self,
        q_THD: torch.Tensor,
        k_UKD: torch.Tensor,
        v_UKD: torch.Tensor,
        segments: Segments,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors: out [T, H, D] in the dtype of q, and the natural log-sum-exp [H, T] of the scaled scores, float32
        (float64 for float64 inputs). A row without keys has output 0 and log-sum-exp -inf."""

    def backward(
        self,
        dout_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_UKD: torch.Tensor,
        v_UKD: torch.Tensor,
        out_THD: torch.Tensor,
        lse_HT: torch.Tensor,
        segments: Segments,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq [T, H, D], and dk, dv [U, K, D] of these keys, for ``out`` and ``lse`` over all keys of a row."""


class PackedKernel(ABC):
    """An ``AttentionKernel`` whose backend sees only segments that have queries and keys."""

    name: str

    def forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        _check(q_THD, k_UKD, v_UKD, segments, causal)
        if _all_filled(segments):
            return self._forward(q_THD, k_UKD, v_UKD, segments, causal, scale)
        return forward_shares([(segments.filled, self._forward)], q_THD, k_UKD, v_UKD, causal, scale)

    def backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        _check(q_THD, k_UKD, v_UKD, segments, causal)
        given = dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT
        if _all_filled(segments):
            return self._backward(*given, segments=segments, causal=causal, scale=scale)
        return backward_shares([(segments.filled, self._backward)], *given, causal=causal, scale=scale)

    @abstractmethod
    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        """``AttentionKernel.forward`` for at least one segment, each with queries and keys."""

    @abstractmethod
    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        """``AttentionKernel.backward`` for at least one segment, each with queries and keys."""


class DenseKernel(PackedKernel):
    """A ``PackedKernel`` over a backend for plain batches: equal segments are one batch, others go one by one."""

    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        parts = [
            self._forward_batch(
                _batch(q_THD[b.q], count), _batch(k_UKD[b.k], count), _batch(v_UKD[b.k], count), causal, scale
            )
            for b, count in _batches(segments)
        ]
        outs, lses = zip(*((out.flatten(0, 1), lse.transpose(0, 1).flatten(1)) for out, lse in parts), strict=True)
        return _join(outs), _join(lses, dim=1)

    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        parts = [
            self._backward_batch(
                _batch(dout_THD[b.q], count),
                _batch(q_THD[b.q], count),
                _batch(k_UKD[b.k], count),
                _batch(v_UKD[b.k], count),
                _batch(out_THD[b.q], count),
                lse_HT[:, b.q].unflatten(1, (count, -1)).transpose(0, 1),
                causal=causal,
                scale=scale,
            )
            for b, count in _batches(segments)
        ]
        return tuple(_join([grad.flatten(0, 1) for grad in grads]) for grads in zip(*parts, strict=True))

    @abstractmethod
    def _forward_batch(self, q_BtHD, k_BuKD, v_BuKD, causal: bool, scale: float):
        """out [B, t, H, D] and log-sum-exp [B, H, t]."""

    @abstractmethod
    def _backward_batch(self, dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD, lse_BHt, causal: bool, scale: float):
        """dq [B, t, H, D], and dk, dv [B, u, K, D]."""


def forward_shares(shares: list[tuple[Choice, Callable]], q_THD, k_UKD, v_UKD, causal: bool, scale: float):
    """``AttentionKernel.forward`` of a row whose segments are dealt to several forward functions, or left out."""
    out_THD = q_THD.new_zeros(q_THD.shape)
    lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
    lse_HT = q_THD.new_full((q_THD.shape[1], q_THD.shape[0]), -torch.inf, dtype=lse_dtype)
    for choice, forward in shares:
        if choice.segments.pairs:
            q, k, v = take(q_THD, choice.ranges_q), take(k_UKD, choice.ranges_k), take(v_UKD, choice.ranges_k)
            out, lse = forward(q, k, v, choice.segments, causal, scale)
            put(out_THD, choice.ranges_q, out)
            put(lse_HT, choice.ranges_q, lse, dim=1)
    return out_THD, lse_HT


def backward_shares(
    shares: list[tuple[Choice, Callable]], dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, causal: bool, scale: float
):
    """``AttentionKernel.backward`` of a row whose segments are dealt to several backward functions, or left out."""
    dq_THD, dk_UKD, dv_UKD = (x.new_zeros(x.shape) for x in (q_THD, k_UKD, v_UKD))
    for choice, backward in shares:
        if choice.segments.pairs:
            dout, q, out = (take(x, choice.ranges_q) for x in (dout_THD, q_THD, out_THD))
            k, v = take(k_UKD, choice.ranges_k), take(v_UKD, choice.ranges_k)
            lse = take(lse_HT, choice.ranges_q, dim=1)
            dq, dk, dv = backward(dout, q, k, v, out, lse, segments=choice.segments, causal=causal, scale=scale)
            put(dq_THD, choice.ranges_q, dq)
            put(dk_UKD, choice.ranges_k, dk)
            put(dv_UKD, choice.ranges_k, dv)
    return dq_THD, dk_UKD, dv_UKD


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _all_filled(segments: Segments) -> bool:
    return 0 < len(segments.pairs) == len(segments.filled.segments.pairs)


def _batches(segments: Segments) -> list[tuple[Bounds, int]]:
    """Token ranges to compute at once, each with its number of equal segments."""
    if segments.uniform:
        return [(Bounds(slice(0, segments.tokens_q), slice(0, segments.tokens_k)), len(segments.pairs))]
    return [(bounds, 1) for bounds in segments.bounds]


def _batch(x: torch.Tensor, segments: int) -> torch.Tensor:
    return x.unflatten(0, (segments, -1))


def _join(parts, dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"attention needs q [T, H, D] and k, v [U, K, D], not {[tuple(x.shape) for x in (q, k, v)]}")
    if (q.shape[0], k.shape[0]) != (segments.tokens_q, segments.tokens_k):
        raise ValueError(
            f"{q.shape[0]} queries and {k.shape[0]} keys do not fill segments of {segments.tokens_q} queries "
            f"and {segments.tokens_k} keys"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
    if causal and segments.lengths_q != segments.lengths_k:
        raise ValueError(
            "causal attention needs as many queries as keys in each segment; use causal=False for other blocks"
        )

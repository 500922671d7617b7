"""The truth: plain softmax attention in float64 that keeps the whole score matrix of a segment (T*U*H*8 bytes).

Legend: T query tokens, U key tokens, H query heads, K key/value heads, R = H/K heads per group, D head dim.
"""

from __future__ import annotations

import torch

from megatron_vila.parallel.kernels.protocol import PackedKernel
from megatron_vila.parallel.kernels.segments import Segments


def available(head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> str | None:
    """None: it runs everywhere, in every floating-point dtype."""
    return None


class ReferenceKernel(PackedKernel):
    name = "reference"

    def __init__(self, deterministic: bool = False) -> None:
        """Always deterministic."""

    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lse_dtype = torch.promote_types(q_THD.dtype, torch.float32)
        lse_HT = torch.empty(q_THD.shape[1], q_THD.shape[0], dtype=lse_dtype, device=q_THD.device)
        for bounds in segments.bounds:
            q_KRTD, k_KUD, v_KUD = _grouped(q_THD[bounds.q], k_UKD[bounds.k], v_UKD[bounds.k])
            scores_KRTU = _scores(q_KRTD, k_KUD, causal, scale)
            lse_KRT = scores_KRTU.logsumexp(-1)
            out_KRTD = torch.einsum("krtu,kud->krtd", (scores_KRTU - lse_KRT.unsqueeze(-1)).exp(), v_KUD)
            out_THD[bounds.q] = _ungrouped(out_KRTD).to(out_THD.dtype)
            lse_HT[:, bounds.q] = lse_KRT.flatten(0, 1).to(lse_dtype)
        return out_THD, lse_HT

    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_UKD, v_UKD))
        for bounds in segments.bounds:
            q_KRTD, k_KUD, v_KUD = _grouped(q_THD[bounds.q], k_UKD[bounds.k], v_UKD[bounds.k])
            dout_KRTD, out_KRTD = (_heads(x[bounds.q], k_KUD.shape[0]) for x in (dout_THD, out_THD))
            lse_KRT = lse_HT[:, bounds.q].double().unflatten(0, (k_KUD.shape[0], -1))
            p_KRTU = (_scores(q_KRTD, k_KUD, causal, scale) - lse_KRT.unsqueeze(-1)).exp()
            dp_KRTU = torch.einsum("krtd,kud->krtu", dout_KRTD, v_KUD)
            delta_KRT1 = (dout_KRTD * out_KRTD).sum(-1, keepdim=True)
            ds_KRTU = p_KRTU * (dp_KRTU - delta_KRT1) * scale
            dq = _ungrouped(torch.einsum("krtu,kud->krtd", ds_KRTU, k_KUD))
            dk = torch.einsum("krtu,krtd->ukd", ds_KRTU, q_KRTD)
            dv = torch.einsum("krtu,krtd->ukd", p_KRTU, dout_KRTD)
            for grad, tokens, part in zip(grads, (bounds.q, bounds.k, bounds.k), (dq, dk, dv), strict=True):
                grad[tokens] = part.to(grad.dtype)
        return grads


def _scores(q_KRTD: torch.Tensor, k_KUD: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    scores_KRTU = torch.einsum("krtd,kud->krtu", q_KRTD, k_KUD) * scale
    if causal:
        future_TU = torch.ones(scores_KRTU.shape[-2:], dtype=torch.bool, device=scores_KRTU.device).triu(1)
        scores_KRTU = scores_KRTU.masked_fill(future_TU, -torch.inf)
    return scores_KRTU


def _grouped(q_THD: torch.Tensor, k_UKD: torch.Tensor, v_UKD: torch.Tensor):
    return _heads(q_THD, k_UKD.shape[1]), k_UKD.double().transpose(0, 1), v_UKD.double().transpose(0, 1)


def _heads(x_THD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x_THD.double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungrouped(x_KRTD: torch.Tensor) -> torch.Tensor:
    return x_KRTD.permute(2, 0, 1, 3).flatten(1, 2)

"""An attention kernel that takes the memory of ``fa4`` and computes nothing: in seconds it is known whether a step fits."""

from __future__ import annotations

import torch

from megatron_vila.parallel.kernels import KERNELS, Segments

NAME = "unfilled"


class UnfilledKernel:
    name = NAME

    def __init__(self, deterministic: bool = False) -> None: ...

    def forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        """Zeros: output [T, H, D] and log-sum-exp [H, T]."""
        return torch.zeros_like(q_THD), q_THD.new_zeros(q_THD.shape[1], q_THD.shape[0], dtype=_wide(q_THD))

    def backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        """Zeros: dq, dk and dv, made beside the float32 sums that ``fa4`` holds meanwhile."""
        sums = [torch.empty_like(x, dtype=_wide(x)) for x in (q_THD, k_UKD, v_UKD)]
        return tuple(torch.zeros_like(total, dtype=q_THD.dtype) for total in sums)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def register() -> None:
    """Make ``model.attention=unfilled`` known in this process."""
    KERNELS[NAME] = (lambda *_: None, UnfilledKernel)

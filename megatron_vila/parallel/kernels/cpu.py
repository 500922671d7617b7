"""PyTorch's blocked attention for CPUs: float64, float32, bfloat16 and float16, grouped heads, O(T) memory.

Legend: B segments of one length, t queries and u keys each, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch

from megatron_vila.parallel.kernels.protocol import DenseKernel

_OPS = torch.ops.aten


def available(head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> str | None:
    """None if this kernel runs on ``device``, else the reason."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return None


class CpuKernel(DenseKernel):
    name = "cpu"

    def __init__(self, deterministic: bool = False) -> None:
        """Always deterministic for a given number of threads."""

    def _forward_batch(self, q_BtHD, k_BuKD, v_BuKD, causal: bool, scale: float):
        out_BHtD, lse_BHt = _OPS._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q_BtHD, k_BuKD, v_BuKD)), 0.0, causal, scale=scale
        )
        return out_BHtD.transpose(1, 2), lse_BHt

    def _backward_batch(self, dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD, lse_BHt, causal: bool, scale: float):
        grads = _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD)),
            lse_BHt,
            0.0,
            causal,
            scale=scale,
        )
        return tuple(grad.transpose(1, 2) for grad in grads)

"""cuDNN's fused attention through PyTorch: fast for plain batches on Hopper and Blackwell.

cuDNN compiles a plan for each new shape, and its own packed form is slow. So equal segments run as one batch, long segments
one by one, and the short rest of a mixed row in one launch of FlashAttention-2.

Legend: B segments of one length, t queries and u keys each, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from megatron_vila.errors import SettingError
from megatron_vila.parallel.kernels import flash2
from megatron_vila.parallel.kernels.protocol import DenseKernel, backward_shares, forward_shares, last_contiguous
from megatron_vila.parallel.kernels.segments import Choice, Segments

_OPS = torch.ops.aten
# Some versions refuse shorter batches.
_MIN_BATCH_TOKENS = 64


def available(head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> str | None:
    """None if this kernel runs there, else the reason. Tries a small batch once per head dim, dtype and device."""
    if reason := flash2.available(head_dim, dtype, device):
        return reason
    if not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} finds no cuDNN"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 changes the layout of its log-sum-exp; unset it"
    if deterministic:
        return "its backward pass has no deterministic form"
    return _trial(head_dim, dtype, device)


@cache
def _trial(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    x = torch.ones(1, 128, 1, head_dim, dtype=dtype, device=device)
    kernel = CudnnKernel()
    try:
        out, lse = kernel._forward_batch(x, x, x, True, 1.0)
        kernel._backward_batch(x, x, x, x, out, lse, causal=True, scale=1.0)
    except RuntimeError as error:
        name, version = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
        return f"cuDNN {version} refuses head dim {head_dim} in {dtype} on {name}: {error}"
    return None


class CudnnKernel(DenseKernel):
    name = "cudnn"
    # From here on the layers of a model gain more from cuDNN in one step than a plan for a new shape costs.
    long_segment_tokens = 16384

    def __init__(self, deterministic: bool = False) -> None:
        """In a row of unequal segments, those with ``long_segment_tokens`` queries and keys or more go to cuDNN."""
        if deterministic:
            raise SettingError("cuDNN's attention has no deterministic backward pass; use flash2 or fa4")
        self._packed = flash2.Flash2Kernel()

    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        long, short = self._split(segments)
        if not short.segments.pairs:
            return super()._forward(q_THD, k_UKD, v_UKD, segments, causal, scale)
        if not long.segments.pairs:
            return self._packed.forward(q_THD, k_UKD, v_UKD, segments, causal, scale)
        shares = [(long, super()._forward), (short, self._packed.forward)]
        return forward_shares(shares, q_THD, k_UKD, v_UKD, causal, scale)

    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        long, short = self._split(segments)
        given = dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT
        if not short.segments.pairs:
            return super()._backward(*given, segments=segments, causal=causal, scale=scale)
        if not long.segments.pairs:
            return self._packed.backward(*given, segments=segments, causal=causal, scale=scale)
        shares = [(long, super()._backward), (short, self._packed.backward)]
        return backward_shares(shares, *given, causal=causal, scale=scale)

    def _split(self, segments: Segments) -> tuple[Choice, Choice]:
        """Segments for cuDNN and for the packed kernel."""
        at_least = _MIN_BATCH_TOKENS if segments.uniform else self.long_segment_tokens
        long = {i for i, pair in enumerate(segments.pairs) if min(pair) >= at_least}
        return segments.choose(sorted(long)), segments.choose([i for i in range(len(segments.pairs)) if i not in long])

    def _forward_batch(self, q_BtHD, k_BuKD, v_BuKD, causal: bool, scale: float):
        out_BHtD, lse_BHt1, *_ = _OPS._scaled_dot_product_cudnn_attention(
            *(last_contiguous(x).transpose(1, 2) for x in (q_BtHD, k_BuKD, v_BuKD)),
            None,
            True,
            0.0,
            causal,
            False,
            scale=scale,
        )
        return out_BHtD.transpose(1, 2), lse_BHt1.squeeze(-1)

    def _backward_batch(self, dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD, lse_BHt, causal: bool, scale: float):
        unused_rng = torch.zeros((), dtype=torch.int64, device=q_BtHD.device)
        grads = _OPS._scaled_dot_product_cudnn_attention_backward(
            # A plan is found by the strides of q, k and v alone: the others must have the same layout every time.
            dout_BtHD.contiguous().transpose(1, 2),
            *(last_contiguous(x).transpose(1, 2) for x in (q_BtHD, k_BuKD, v_BuKD)),
            out_BtHD.contiguous().transpose(1, 2),
            lse_BHt.contiguous().unsqueeze(-1),
            unused_rng,
            unused_rng,
            None,
            None,
            None,
            q_BtHD.shape[1],
            k_BuKD.shape[1],
            0.0,
            causal,
            scale=scale,
        )
        return tuple(grad.transpose(1, 2) for grad in grads)

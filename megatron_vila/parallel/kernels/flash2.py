"""FlashAttention-2 as PyTorch ships it: any NVIDIA GPU from Ampere on, packed segments in one launch.

Legend: T query tokens, U key tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from megatron_vila.parallel.kernels.protocol import PackedKernel, last_contiguous
from megatron_vila.parallel.kernels.segments import Segments

_OPS = torch.ops.aten
_MAX_HEAD_DIM = 256


def available(head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> str | None:
    """None if this kernel runs there, else the reason."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return f"it needs compute capability 8.0 (Ampere) or newer, not {torch.cuda.get_device_name(device)}"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without it"
    return wrong_inputs(head_dim, dtype, _MAX_HEAD_DIM)


def wrong_inputs(head_dim: int, dtype: torch.dtype, max_head_dim: int) -> str | None:
    """The reason why a 16-bit tensor-core kernel cannot take these inputs, if any."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}"
    if head_dim % 8 or not 8 <= head_dim <= max_head_dim:
        return f"it needs a head dim that is a multiple of 8 up to {max_head_dim}, not {head_dim}"
    return None


class Flash2Kernel(PackedKernel):
    name = "flash2"

    def __init__(self, deterministic: bool = False) -> None:
        """``deterministic``: dq is summed in a fixed order, with one float32 copy of it per wave of blocks."""
        self._deterministic = deterministic

    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        cu_q, cu_k = segments.cu_seqlens(q_THD.device)
        out_THD, lse_HT, *_ = _OPS._flash_attention_forward(
            *(last_contiguous(x) for x in (q_THD, k_UKD, v_UKD)),
            cu_q,
            cu_k,
            *_launch_lengths(segments),
            0.0,
            causal,
            False,
            scale=scale,
        )
        return out_THD, lse_HT

    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        cu_q, cu_k = segments.cu_seqlens(q_THD.device)
        unused_rng = torch.empty(2, dtype=torch.uint64, device=q_THD.device)
        with _deterministic_algorithms() if self._deterministic else nullcontext():
            return _OPS._flash_attention_backward(
                dout_THD.contiguous(),
                *(last_contiguous(x) for x in (q_THD, k_UKD, v_UKD)),
                out_THD.contiguous(),
                lse_HT.contiguous(),
                cu_q,
                cu_k,
                *_launch_lengths(segments),
                0.0,
                causal,
                unused_rng,
                unused_rng,
                scale=scale,
            )


def _launch_lengths(segments: Segments) -> tuple[int, int]:
    """Longest segments of queries and keys; only the size of the launch depends on them."""
    # A longest query segment of 1 takes a decoding path that splits keys and regroups heads.
    return max(segments.max_q, 2), segments.max_k


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """The operator takes its choice of algorithm from this global setting only."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

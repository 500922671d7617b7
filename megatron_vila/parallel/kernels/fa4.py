"""FlashAttention-4 (package ``flash-attn-4``, module ``flash_attn.cute``): the fastest kernel on Hopper and Blackwell.

It compiles each variant at first use (seconds each); FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 keeps them on disk.

Legend: T query tokens, U key tokens, H query heads, K key/value heads, D head dim; B segments of one length with t queries
and u keys each.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch

from megatron_vila.parallel.kernels.flash2 import wrong_inputs
from megatron_vila.parallel.kernels.protocol import DenseKernel, last_contiguous
from megatron_vila.parallel.kernels.segments import Segments

_INSTALL = "pip install 'flash-attn-4[cu13]==4.0.0b36' (extra gpu)"
# 4.0.0b36 gave a wrong dQ for head dim 72 on an H200 (87 times the error of plain bfloat16 attention).
CHECKED_HEAD_DIMS = (64, 128)
_SHARED = {"softmax_scale", "causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_NEEDED = {"_flash_attn_fwd": _SHARED | {"return_lse", "pack_gqa"}, "_flash_attn_bwd": _SHARED | {"deterministic"}}


def available(head_dim: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False) -> str | None:
    """None if this kernel runs there, else the reason."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, not {device.type}"
    generation, name = torch.cuda.get_device_capability(device)[0], torch.cuda.get_device_name(device)
    if generation < 9:
        return f"its backward pass needs compute capability 9.0 (Hopper) or newer, not {name}"
    if generation == 12 and deterministic:
        return f"it has no deterministic backward pass on {name}"
    if head_dim not in CHECKED_HEAD_DIMS:
        checked = " and ".join(map(str, CHECKED_HEAD_DIMS))
        return f"its gradients were checked for head dims {checked} only, not for {head_dim}"
    return wrong_inputs(head_dim, dtype, max(CHECKED_HEAD_DIMS)) or _missing()


@cache
def _missing() -> str | None:
    """Why the package cannot be used here; the same for the whole process."""
    try:
        from flash_attn.cute import interface
    except ModuleNotFoundError as error:
        return f"the package flash-attn-4 is not installed (no module {error.name}); {_INSTALL}"
    except Exception as error:  # the compiler behind it loads driver libraries, which fail in many ways
        return f"the package flash-attn-4 does not load ({type(error).__name__}: {error}); {_INSTALL}"
    for function, needed in _NEEDED.items():
        absent = needed - set(inspect.signature(getattr(interface, function, lambda: None)).parameters)
        if absent:
            lacking = f"{function} lacks {', '.join(sorted(absent))}"
            return f"another version of flash-attn-4 is installed ({lacking}); {_INSTALL}"
    return None


class Fa4Kernel(DenseKernel):
    """Equal segments run as a plain batch, a mixed row as one packed launch."""

    name = "fa4"

    def __init__(self, deterministic: bool = False) -> None:
        """``deterministic``: blocks add to dq (and to dk, dv of grouped heads) in a fixed order."""
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        self._run_forward, self._run_backward = _flash_attn_fwd, _flash_attn_bwd
        self._deterministic = deterministic

    def _forward(self, q_THD, k_UKD, v_UKD, segments: Segments, causal: bool, scale: float):
        if segments.uniform:
            return super()._forward(q_THD, k_UKD, v_UKD, segments, causal, scale)
        # Without the mask, query heads that share a tile cost 4 to 8 % of a packed call's time on an H200; with it neither wins.
        heads = {} if causal else {"pack_gqa": False}
        return self._call_forward(q_THD, k_UKD, v_UKD, causal, scale, **_packed(segments, q_THD.device), **heads)

    def _backward(self, dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT, segments: Segments, causal: bool, scale: float):
        given = dout_THD, q_THD, k_UKD, v_UKD, out_THD, lse_HT
        if segments.uniform:
            return super()._backward(*given, segments=segments, causal=causal, scale=scale)
        return self._call_backward(*given, causal=causal, scale=scale, **_packed(segments, q_THD.device))

    def _forward_batch(self, q_BtHD, k_BuKD, v_BuKD, causal: bool, scale: float):
        return self._call_forward(q_BtHD, k_BuKD, v_BuKD, causal, scale)

    def _backward_batch(self, dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD, lse_BHt, causal: bool, scale: float):
        return self._call_backward(dout_BtHD, q_BtHD, k_BuKD, v_BuKD, out_BtHD, lse_BHt, causal=causal, scale=scale)

    def _call_forward(self, q, k, v, causal: bool, scale: float, **packed):
        q, k, v = (last_contiguous(x) for x in (q, k, v))
        out, lse, *_ = self._run_forward(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **packed)
        return out, lse

    def _call_backward(self, dout, q, k, v, out, lse, causal: bool, scale: float, **packed):
        q, k, v, out, dout = (last_contiguous(x) for x in (q, k, v, out, dout))
        return self._run_backward(
            q,
            k,
            v,
            out,
            dout,
            lse.contiguous(),
            softmax_scale=scale,
            causal=causal,
            deterministic=self._deterministic,
            **packed,
        )


def _packed(segments: Segments, device: torch.device) -> dict[str, torch.Tensor | int]:
    cu_q, cu_k = segments.cu_seqlens(device)
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": segments.max_q,
        "max_seqlen_k": segments.max_k,
    }

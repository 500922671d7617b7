"""Rotary position embedding from explicit positions (RoFormer, arXiv 2104.09864; half-split layout of Llama and Qwen2).

Positions are data here, not a counter: under MM-SP a rank holds two chunks of each packed document.

Legend: S tokens, H heads, D head dim, N = D/2 rotation frequencies.
"""

from __future__ import annotations

import torch

from megatron_vila.accelerator import compiled_on_cuda


def rotary_angles(
    positions_S: torch.Tensor, head_dim: int, theta: float, scaling_factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, D] of position / scaling_factor * theta^(-2n/D), the N angles repeated for both halves.

    ``positions_S`` int64. The result is float64 if ``dtype`` is float64, else float32, on the device of the
    positions. Angles are always formed in float64: at a position of a million, float32 is off by up to 0.06 radian.
    The head dim is even, theta and factor are positive. Raises ``ValueError`` for positions that are not integers.
    """
    assert head_dim % 2 == 0 and theta > 0 and scaling_factor > 0, (head_dim, theta, scaling_factor)
    if positions_S.is_floating_point():
        raise ValueError(f"positions are {positions_S.dtype}; give token positions as int64")
    exponents_N = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_S.device) / head_dim
    angles_SN = torch.outer(positions_S.double() / scaling_factor, theta**-exponents_N)
    angles_SD = torch.cat([angles_SN, angles_SN], dim=-1)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    return angles_SD.cos().to(result), angles_SD.sin().to(result)


def rotary_qkv(
    qkv_SKGD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one product, apart and contiguous: q [S, H, D] and k [S, K, D] rotated, v [S, K, D] as it is.

    ``qkv_SKGD`` holds for each of K key/value heads its query heads, the key and the value: G = H/K + 2. Each pair (n, n + D/2)
    is rotated by its angle. The products are formed in the wider dtype of ``qkv_SKGD`` and ``cos_SD`` and rounded once. The
    gradient, one tensor, is the rotation back: only the angles are saved.
    """
    return _RotaryQKV.apply(qkv_SKGD, cos_SD, sin_SD)


class _RotaryQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_SKGD, cos_SD, sin_SD):
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn_apart(qkv_SKGD, cos_SD, sin_SD)

    @staticmethod
    def backward(ctx, dq_SHD, dk_SKD, dv_SKD):
        tokens, kv_heads, dim = dk_SKD.shape
        dq_SKgD = dq_SHD.unflatten(1, (kv_heads, -1))
        dqkv_SKGD = dk_SKD.new_empty(tokens, kv_heads, dq_SKgD.shape[2] + 2, dim)
        # Written to their places one by one: if the compiler joined them, it would copy all of them once more.
        _turn_queries_back(dqkv_SKGD[:, :, :-2], dq_SKgD, *ctx.saved_tensors)
        _turn_keys_back(dqkv_SKGD[:, :, -2], dk_SKD, *ctx.saved_tensors)
        dqkv_SKGD[:, :, -1] = dv_SKD
        return dqkv_SKGD, None, None


# Separate functions, so that each is compiled for its own tensors.
@compiled_on_cuda
def _turn_apart(qkv, cos, sin):
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    return _turned(q, cos, sin), _turned(k, cos, sin), v.contiguous()


@compiled_on_cuda
def _turn_queries_back(place, dq, cos, sin):
    place.copy_(_turned(dq, cos, -sin))


@compiled_on_cuda
def _turn_keys_back(place, dk, cos, sin):
    place.copy_(_turned(dk, cos, -sin))


def _turned(x, cos, sin):
    half = x.shape[-1] // 2
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    cos, sin = cos[..., :half], sin[..., :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)], dim=-1)

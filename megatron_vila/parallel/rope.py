"""Rotary position embedding from explicit positions (RoFormer, arXiv 2104.09864; half-split layout of Llama and Qwen2).

Positions are data here, not a counter: under MM-SP a rank holds two chunks of each packed document.

Legend: S tokens, H heads, D head dim, N = D/2 rotation frequencies.
"""

from __future__ import annotations

import torch

from megatron_vila.platform import compiled_on_cuda


def rotary_angles(
    positions_S: torch.Tensor, head_dim: int, theta: float, scaling_factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [S, D] of position / scaling_factor * theta^(-2n/D), the N angles repeated for both halves.

    ``positions_S`` int64. The result is float64 if ``dtype`` is float64, else float32, on the device of the
    positions. Angles are always formed in float64: at a position of a million, float32 is off by up to 0.06 radian.
    Raises ``ValueError`` for an odd head dim, a theta or a factor that is not positive, and positions that are not
    integers.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd and rotary embedding turns pairs; use an even head_dim")
    if theta <= 0 or scaling_factor <= 0:
        raise ValueError(f"rope_theta={theta} and rope_scaling_factor={scaling_factor} must be above 0")
    if positions_S.is_floating_point():
        raise ValueError(f"positions are {positions_S.dtype}; give token positions as int64")
    exponents_N = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_S.device) / head_dim
    angles_SN = torch.outer(positions_S.double() / scaling_factor, theta**-exponents_N)
    angles_SD = torch.cat([angles_SN, angles_SN], dim=-1)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    return angles_SD.cos().to(result), angles_SD.sin().to(result)


def apply_rotary(x_SHD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    """Turn each pair (n, n + D/2) of ``x_SHD`` by its angle; same shape and dtype.

    The products are formed in the wider dtype of ``x_SHD`` and ``cos_SD`` and rounded once. The gradient is the turn
    back: only the angles are saved.
    """
    return _Rotary.apply(x_SHD, cos_SD, sin_SD)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SHD, cos_SD, sin_SD):
        ctx.save_for_backward(cos_SD, sin_SD)
        return _turn(x_SHD, cos_SD, sin_SD)

    @staticmethod
    def backward(ctx, dout_SHD):
        cos_SD, sin_SD = ctx.saved_tensors
        return _turn_back(dout_SHD, cos_SD, sin_SD), None, None


# Forward and backward pass each have their own function: each is compiled for the tensors that it meets.
@compiled_on_cuda
def _turn(x, cos, sin):
    return _turned(x, cos, sin)


@compiled_on_cuda
def _turn_back(dout, cos, sin):
    return _turned(dout, cos, -sin)


def _turned(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)], dim=-1)

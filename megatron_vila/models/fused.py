"""The parts of a decoder layer between the matrix products: compiled on a GPU, and no more saved than is needed.

Each operation is a pair of plain functions, forward and backward, under one autograd function
(``platform.compiled_on_cuda``). 16-bit inputs are computed in float32 and rounded once.

Legend: T tokens (and any further leading dimensions), H hidden size, F width of the MLP of this tensor-parallel rank.
"""

from __future__ import annotations

import torch

from megatron_vila.platform import compiled_on_cuda


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x."""
    return _RMSNorm.apply(x_TH, None, weight_H, eps)[1]


def add_rms_norm(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + residual and its ``rms_norm``."""
    return _RMSNorm.apply(x_TH, residual_TH, weight_H, eps)


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the two halves of the last dimension: [T, 2F] to [T, F]. Only the input is saved."""
    return _SwiGLU.apply(gate_up_T2F)


@compiled_on_cuda
def swiglu_backward_(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> torch.Tensor:
    """The gradient of ``swiglu`` [T, 2F], and its value once more, written over ``dout_TF``. Not for autograd."""
    dgate_up_T2F = _silu_times_gradient(gate_up_T2F, dout_TF)
    dout_TF.copy_(_silu_times_of(gate_up_T2F))
    return dgate_up_T2F


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, residual_TH, weight_H, eps):
        if residual_TH is None:
            out_TH, scale_T1 = _norm(x_TH, weight_H, eps)
        else:
            x_TH, out_TH, scale_T1 = _add_norm(x_TH, residual_TH, weight_H, eps)
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        ctx.added = residual_TH is not None
        return (x_TH if ctx.added else None), out_TH

    @staticmethod
    def backward(ctx, dsum_TH, dout_TH):
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        if ctx.added:
            dx_TH = _add_norm_backward(dout_TH, dsum_TH, x_TH, weight_H, scale_T1)
        else:
            dx_TH = _norm_backward(dout_TH, x_TH, weight_H, scale_T1)
        dweight_H = _norm_backward_weight(dout_TH, x_TH, weight_H, scale_T1) if ctx.needs_input_grad[2] else None
        return dx_TH, (dx_TH if ctx.added else None), dweight_H, None


def _norm_of(x, weight, eps):
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype), scale


@compiled_on_cuda
def _norm(x, weight, eps):
    return _norm_of(x, weight, eps)


@compiled_on_cuda
def _add_norm(x, residual, weight, eps):
    total = x + residual
    return total, *_norm_of(total, weight, eps)


def _norm_gradient(dout, x, weight, scale):
    normed, dnormed = _wide(x) * scale, _wide(dout) * _wide(weight)
    return scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))


@compiled_on_cuda
def _norm_backward(dout, x, weight, scale):
    return _norm_gradient(dout, x, weight, scale).to(x.dtype)


@compiled_on_cuda
def _add_norm_backward(dout, dsum, x, weight, scale):
    return (_norm_gradient(dout, x, weight, scale) + _wide(dsum)).to(x.dtype)


@compiled_on_cuda
def _norm_backward_weight(dout, x, weight, scale):
    return (_wide(dout) * _wide(x) * scale).flatten(0, -2).sum(0).to(weight.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F):
        ctx.save_for_backward(gate_up_T2F)
        return _silu_times(gate_up_T2F)

    @staticmethod
    def backward(ctx, dout_TF):
        (gate_up_T2F,) = ctx.saved_tensors
        return _silu_times_backward(gate_up_T2F, dout_TF)


@compiled_on_cuda
def _silu_times(gate_up):
    return _silu_times_of(gate_up)


def _silu_times_of(gate_up):
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@compiled_on_cuda
def _silu_times_backward(gate_up, dout):
    return _silu_times_gradient(gate_up, dout)


def _silu_times_gradient(gate_up, dout):
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    dout, sigmoid = _wide(dout), torch.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([dgate, dout * gate * sigmoid], dim=-1).to(gate_up.dtype)

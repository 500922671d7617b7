"""The parts of a decoder layer between the matrix products: compiled on a GPU, saving no more than is needed.

Each operation is a pair of plain functions, forward and backward, under one autograd function
(``accelerator.compiled_on_cuda``). 16-bit inputs are computed in float32 and rounded once.

Legend: T tokens (and any further leading dimensions), H hidden size, F width of the MLP of this tensor-parallel rank.
"""

from __future__ import annotations

import torch

from megatron_vila.accelerator import compiled_on_cuda


def rms_norm(
    x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, residual_TH: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream and its norm, x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x.

    The stream is x, or x + residual. Use it in the place of x from here on: then the norm's backward pass adds the
    two gradients.
    """
    return _RMSNorm.apply(x_TH, residual_TH, weight_H, eps)


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the two halves of the last dimension: [T, 2F] to [T, F]. Only the input is saved."""
    return _SwiGLU.apply(gate_up_T2F)


def swiglu_backward_(gate_up_T2F: torch.Tensor, dout_TF: torch.Tensor) -> torch.Tensor:
    """The gradient of ``swiglu`` [T, 2F], and its value once more, written over ``dout_TF``. Not for autograd."""
    dgate_up_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
    _write_gradient_and_value(*gate_up_T2F.chunk(2, dim=-1), dout_TF, *dgate_up_T2F.chunk(2, dim=-1))
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
        ctx.set_materialize_grads(False)
        return x_TH, out_TH

    @staticmethod
    def backward(ctx, dstream_TH, dout_TH):
        if dout_TH is None:  # the norm was not used
            dx_TH, dweight_H = dstream_TH, None
        elif dstream_TH is None:
            dx_TH, dweight_H = _norm_backward(dout_TH, *ctx.saved_tensors)
        else:
            dx_TH, dweight_H = _add_norm_backward(dout_TH, dstream_TH, *ctx.saved_tensors)
        return dx_TH, (dx_TH if ctx.added else None), (dweight_H if ctx.needs_input_grad[2] else None), None


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


def _norm_gradients(dout, x, weight, scale):
    """Gradients of x (in the wider dtype) and of the weight, in one function so that the compiler forms both in one pass. That of
    a frozen weight is dropped."""
    normed, wide = _wide(x) * scale, _wide(dout)
    dnormed = wide * _wide(weight)
    dx = scale * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx, (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)


@compiled_on_cuda
def _norm_backward(dout, x, weight, scale):
    dx, dweight = _norm_gradients(dout, x, weight, scale)
    return dx.to(x.dtype), dweight


@compiled_on_cuda
def _add_norm_backward(dout, dstream, x, weight, scale):
    dx, dweight = _norm_gradients(dout, x, weight, scale)
    return (dx + _wide(dstream)).to(x.dtype), dweight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F):
        ctx.save_for_backward(gate_up_T2F)
        return _silu_times(gate_up_T2F)

    @staticmethod
    def backward(ctx, dout_TF):
        (gate_up_T2F,) = ctx.saved_tensors
        dgate_up_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
        gate_up, dgate_up = (x.flatten(0, -2).chunk(2, dim=-1) for x in (gate_up_T2F, dgate_up_T2F))
        _write_gradient(*gate_up, dout_TF.flatten(0, -2), *dgate_up)
        return dgate_up_T2F


@compiled_on_cuda
def _silu_times(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return _silu_times_of(gate, up).to(gate_up.dtype)


# The halves are separate arguments: if compiled code joined them, it would read the inputs anew for each half.
@compiled_on_cuda
def _write_gradient(gate, up, dout, dgate, dup):
    for place, value in zip((dgate, dup), _silu_times_gradient(gate, up, dout), strict=True):
        place.copy_(value)


@compiled_on_cuda
def _write_gradient_and_value(gate, up, dout, dgate, dup):
    gradients, value = _silu_times_gradient(gate, up, dout), _silu_times_of(gate, up)
    for place, result in zip((dgate, dup, dout), (*gradients, value), strict=True):
        place.copy_(result)


def _silu_times_of(gate, up):
    return torch.nn.functional.silu(_wide(gate)) * _wide(up)


def _silu_times_gradient(gate, up, dout):
    gate, up, dout = _wide(gate), _wide(up), _wide(dout)
    sigmoid = torch.sigmoid(gate)
    return dout * up * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid

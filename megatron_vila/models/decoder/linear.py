"""Megatron-Core's parallel linear layers, whose weight gradients go straight into Megatron's buffers.

Megatron-Core does so itself where a CUDA extension of Apex is installed (``gradient_accumulation_fusion``); here it is the
product of ``models/decoder/weight_gradient.py``, everywhere and in every dtype.

Legend: n tokens, I inputs and O outputs of the weight held by this rank.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_vila.models.decoder.weight_gradient import WeightGradient


class ColumnLinear(ColumnParallelLinear):
    """Outputs split over tp. Under sequence parallelism Megatron's own product is used: it hides the gather of tokens."""

    def _forward_impl(self, input, weight, *args, bias=None, **kwargs):
        if self.sequence_parallel or not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, bias=bias, **kwargs)
        return _Product.apply(input, weight, bias)


class RowLinear(RowParallelLinear):
    """Inputs split over tp; the sum over tp follows outside of the product."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        if not weight.requires_grad:
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _Product.apply(input, weight, None)


class _Product(torch.autograd.Function):
    """[..., I] to [..., O]: x @ weight^T + bias."""

    @staticmethod
    def forward(ctx, x_nI, weight_OI, bias_O):
        ctx.save_for_backward(x_nI, weight_OI)
        return torch.nn.functional.linear(x_nI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, grad_nO):
        x_nI, weight_OI = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx_nI = grad_nO @ weight_OI if needs_x else None
        grad_nO = grad_nO.reshape(-1, grad_nO.shape[-1])
        total = WeightGradient(weight_OI, tiles=1)
        total.add(grad_nO, x_nI.reshape(-1, x_nI.shape[-1]))
        return dx_nI, total.result(), grad_nO.sum(0) if needs_bias else None

"""Weight gradients of our own backward passes, summed straight into Megatron's buffers, without a second pass over them.

Under Megatron's DDP a weight carries ``main_grad``, a slice of the gradient buffer. A product is added to it by the matrix
product itself (``beta = 1``), as Transformer Engine and Apex do for Megatron's linear layers.

Legend: T tokens, O outputs and I inputs of the weight held by this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class WeightGradient:
    """The gradient of ``weight`` [O, I] as a sum of products, one for each of ``tiles`` tiles of tokens.

    16-bit tiles are summed in float32, as one product over all tokens would; one tile goes straight into ``main_grad``,
    whatever its dtype. Without ``main_grad`` the product of one tile is the gradient.
    """

    def __init__(self, weight_OI: torch.Tensor, tiles: int) -> None:
        self._weight = weight_OI
        self._main = getattr(weight_OI, "main_grad", None)
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        self._begun = True
        if self._main is not None and (tiles == 1 or self._main.dtype == wide):
            self._sum = self._main
        elif tiles == 1:
            self._sum, self._begun = torch.empty_like(weight_OI), False
        else:
            self._sum = torch.zeros_like(weight_OI, dtype=wide)

    def add(self, dout_TO: torch.Tensor, x_TI: torch.Tensor, multiply: Callable[..., None] | None = None) -> None:
        """Add dout^T @ x, formed by ``multiply(a, b, out, add)`` (default: PyTorch's product)."""
        (multiply or _multiply)(dout_TO.t(), x_TI, self._sum, add=self._begun)
        self._begun = True

    def result(self) -> torch.Tensor:
        """What the backward pass returns for the weight."""
        if self._main is None:
            return self._sum.to(self._weight.dtype)
        if self._sum is not self._main:
            self._main.add_(self._sum)
        return nothing(self._weight)


def add_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out += a @ b; the product of 16-bit operands is summed in float32 and rounded once, with what was there."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    if add:
        add_product(a, b, out)
    else:
        torch.mm(a, b, out=out)


def nothing(weight: torch.Tensor) -> torch.Tensor:
    """A gradient that adds nothing and takes no memory.

    Returned to autograd, it makes DDP's hook run as for any gradient (it must, and on the thread of the backward pass), and a
    gradient of the same weight as a tied embedding is still added.
    """
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)

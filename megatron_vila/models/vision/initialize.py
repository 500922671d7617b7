"""What the vision tower and the projector share: initial weights, and exact zero gradients on ranks without frames."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def initialize(module: nn.Module, std: float) -> None:
    """Fill every parameter of ``module`` in place: matrices from N(0, std), biases 0, norm weights 1.

    The order is that of the sorted parameter names and the numbers come from torch's CPU generator: the weights follow
    from ``torch.manual_seed`` before the module is built, whatever the process grid.
    """
    for name, parameter in sorted(module.named_parameters()):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=std)


def zero_connected_to(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """An exact scalar zero whose backward pass gives each of ``tensors`` that requires it a gradient of exact zeros.

    A rank without frames adds it to its empty output: Megatron's overlapped gradient reduction waits for every
    parameter.
    """
    return torch.cat([tensor.reshape(-1)[:0] for tensor in tensors]).sum()

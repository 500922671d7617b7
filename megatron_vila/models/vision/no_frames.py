"""What tower and projector return on ranks without frames."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def zero_connected_to(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """An exact scalar zero whose backward pass gives each of ``tensors`` that requires it a gradient of exact zeros.

    A rank without frames adds it to its empty output: Megatron's overlapped gradient reduction waits for every
    parameter.
    """
    return torch.cat([tensor.reshape(-1)[:0] for tensor in tensors]).sum()

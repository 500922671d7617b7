"""A decoding step that is run again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GraphedStep:
    """``step``, called as it is."""

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._step = step

    def __call__(self) -> torch.Tensor:
        return self._step()

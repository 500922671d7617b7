"""Where the units of a sample stand among its visual tokens, and which features belong to one kind of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_vila.accelerator import to_device


def starts_of(places_N: np.ndarray, counts: Sequence[int], what: str, need: str) -> list[int]:
    """The place of the first token of each unit, where ``places_N`` int64 [N] are those of all visual tokens of one kind, and the
    units take ``counts`` of them.

    ``what`` names the tokens in messages ("picture tokens (id 5)"), ``need`` says what needs how many. Raises ``ValueError`` for
    another number of tokens and for units whose tokens do not stand side by side.
    """
    if len(places_N) != sum(counts):
        raise ValueError(f"has {len(places_N)} {what} but {need} need {sum(counts)}")
    firsts = np.cumsum([0, *counts])[:-1]
    for number, (first, count) in enumerate(zip(firsts, counts, strict=True)):
        if places_N[first + count - 1] - places_N[first] != count - 1:
            raise ValueError(f"has {what} of which number {number} has text between them; put no text there")
    starts: list[int] = places_N[firsts].tolist() if counts else []
    return starts


def chosen(features_MC: torch.Tensor, wanted_M: np.ndarray) -> torch.Tensor:
    """The features of those tokens that ``wanted_M`` bool [M], in host memory, names. The device is not waited for."""
    index = to_device(torch.from_numpy(np.flatnonzero(wanted_M)), features_MC.device)
    return features_MC.index_select(0, index)

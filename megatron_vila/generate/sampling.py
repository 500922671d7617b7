"""The next token from its logits: the likeliest, or drawn at random among the likely ones.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vila.errors import SettingError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature), among the
    ``top_k`` likeliest (0: all) and of these the fewest whose probabilities reach ``top_p``. The same ``seed`` draws the same
    tokens. An answer ends with one of ``stop_ids``, or after ``max_new_tokens``. Raises ``SettingError``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value, fits, what in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:
                raise SettingError(f"{name}={value} must be {what}")


def choose(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """A token of each row, int64 [B]; ``generator`` is on the device of the logits."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # From the highest on, so that no temperature is too low to divide by.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probabilities_BV = sorted_BV.softmax(-1)
        # A token stays if those before it have not reached top_p: the first one always does.
        is_out_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(is_out_BV.scatter(-1, order_BV, is_out_BV), -torch.inf)
    # The smallest of exponential times over rates is drawn with the rates' probabilities.
    times_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
    return (logits_BV.softmax(-1) / times_BV).argmax(-1)

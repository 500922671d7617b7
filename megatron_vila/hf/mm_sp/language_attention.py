"""The attention of the language model under MM-SP, as Transformers calls it: what a call carries as ``mm_sp_row`` attends."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from megatron_vila.hf.mm_sp.checks import refusal_of

ATTENTION = "mm_sp"
"""The name under which Transformers knows this attention."""


class Attending(Protocol):
    """The keyword ``mm_sp_row`` on its way through the layers: a row in training, a chunk of a prompt or a decoded token."""

    def attend(
        self, layer: int, query_1HsD: torch.Tensor, key_1KsD, value_1KsD, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention [1, s, H, D] of the local tokens in layer number ``layer``."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    mm_sp_row: Attending | None = None,
    **_unused,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [1, H, s, D], key and value [1, K, s, D] after rotation, to [1, s, H, D]."""
    if mm_sp_row is None:
        raise ValueError(
            f"{type(module).__name__} was called without mm_sp_row; call the whole model with a batch of the collator"
        )
    refused = {
        "attention_mask": attention_mask is not None,
        "dropout": dropout > 0,
        "softcap": softcap is not None,
    }
    if any(refused.values()):
        names = ", ".join(name for name, is_set in refused.items() if is_set)
        raise ValueError(
            f"{type(module).__name__} asks for {names}, which MM-SP does not support; turn it off in the model's config"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # As SDPA does: values come from a layer in 16 bits, queries and keys from a rotation in float32.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    return mm_sp_row.attend(module.layer_idx, query, key, value, scale, sliding_window), None


def no_mask(*_unused, attention_mask: torch.Tensor | None = None, **_also_unused) -> None:
    """Transformers' mask interface: makes no mask, since the row knows documents and causality. It refuses a mask that is given,
    which would be dropped silently. Raises ``ValueError``."""
    if attention_mask is not None:
        raise ValueError(refusal_of(["attention_mask"]))

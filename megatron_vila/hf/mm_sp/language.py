"""The language models that MM-SP runs under Transformers, and settings of them that it refuses or has to know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from megatron_vila.plan.layouts import ulysses_problem

TEXT_MODELS = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "olmo2", "glm4",
)  # fmt: skip

_LAYERS = ("full_attention", "sliding_attention")
_LONGEST_POSITION = ("dynamic", "longrope")
_DROPS_CACHE_AT = "original_max_position_embeddings"


def language_problems(text: PreTrainedConfig, ulysses: int) -> list[str]:
    """What in the configuration ``text`` of a language model would give wrong gradients, each with its cure."""
    problems = []
    if not getattr(text, "is_causal", True):
        problems.append("is_causal=False is not supported, since MM-SP's attention is causal; set is_causal=True")
    if getattr(text, "use_bidirectional_attention", None):
        problems.append(
            f"use_bidirectional_attention={text.use_bidirectional_attention} is not supported, since MM-SP's attention is "
            "causal; set use_bidirectional_attention=False"
        )
    others = [kind for kind in getattr(text, "layer_types", None) or () if kind not in _LAYERS]
    if others:
        problems.append(f"layer_types with {others[0]} are not supported; use {' and '.join(_LAYERS)}")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        problems.append(
            f"attn_logit_softcapping={text.attn_logit_softcapping} is not supported, since no attention kernel here caps scores; "
            "set attn_logit_softcapping=None, which changes the model a little, as attn_implementation='sdpa' used to do"
        )
    if getattr(text, "attention_dropout", 0.0):
        problems.append(f"attention_dropout={text.attention_dropout} is not supported; set attention_dropout=0.0")
    for rope in _rope_types(getattr(text, "rope_parameters", None) or {}):
        if rope in _LONGEST_POSITION:
            problems.append(
                f"rope_type={rope} takes its angles from the longest position that a process sees, which differs between the "
                "ranks; use default, linear, yarn or llama3"
            )
    if getattr(text, "output_router_logits", False):
        problems.append(
            "output_router_logits=True adds a balance loss that each rank would compute from its own tokens only; set "
            "output_router_logits=False"
        )
    if ulysses > 0 and (problem := ulysses_problem(text.num_attention_heads, ulysses)):
        problems.append(problem)
    return problems


def sliding_window(text: PreTrainedConfig) -> int | None:
    """To how many tokens, itself included, a token attends in the layers that have a window; None if no layer has one."""
    layers = getattr(text, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    return getattr(text, "sliding_window", None)


@contextmanager
def keeps_its_cache(text: PreTrainedConfig) -> Iterator[None]:
    """Phi-3 drops its cache at ``original_max_position_embeddings`` tokens, for the angles of ``longrope``, which is refused."""
    longest = getattr(text, _DROPS_CACHE_AT, None)
    if longest is None:
        yield
        return
    setattr(text, _DROPS_CACHE_AT, sys.maxsize)
    try:
        yield
    finally:
        setattr(text, _DROPS_CACHE_AT, longest)


def _rope_types(parameters: dict[str, Any]) -> Iterator[str]:
    """The type of each rotary embedding; Gemma 3 has one for each kind of layer."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for one in nested or [parameters]:
        yield one.get("rope_type", "default")

"""What MM-SP under Transformers refuses, and why: settings of a model, and arguments of a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from megatron_vila.hf.mm_sp.adapters import ADAPTERS
from megatron_vila.hf.mm_sp.language import TEXT_MODELS, language_problems
from megatron_vila.plan.grid import GridShape

_CURE = {
    "attention_mask": "the collator takes padding out and packs documents by itself",
    "past_key_values": "call model.generate, with a cache of mm_sp.cache() or without",
    "use_cache": "call model.generate, which keeps a cache",
    "inputs_embeds": "give input_ids",
    "pixel_values": "give whole samples to the collator, which reads their pictures",
    "pixel_values_videos": "give whole samples to the collator, which reads their videos",
    "mm_encoder_outputs": "give whole samples to the collator",
    "logits_to_keep": "leave it out; the output layer computes supervised tokens only, or all tokens if there are no labels",
    "shift_labels": "give labels, which the collator shifts",
    "output_attentions": "no attention weights are formed; use attn_implementation='eager' without MM-SP",
    "output_router_logits": "each rank would balance its own tokens only; leave it out",
    "return_dict": "read the fields of the output by name",
}


def check_model(model: PreTrainedModel, ulysses: int, name: str) -> None:
    """Raise ``ValueError`` that lists every setting of ``model`` with which its gradients would be wrong.

    ``ulysses`` is the size of the Ulysses group, ``name`` the attention implementation of a model that has MM-SP on.
    """
    config = model.config
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None and config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"model_type={config.model_type} has not been checked with MM-SP; use {', '.join(TEXT_MODELS)} "
            f"or, with vision, {', '.join(ADAPTERS)}"
        )
    text = config.get_text_config()
    problems = [] if adapter is None else adapter.problems(config)
    text_models = TEXT_MODELS if adapter is None else adapter.text_models
    if text.model_type not in text_models:
        problems.append(f"text_config.model_type={text.model_type} is not supported; use {', '.join(text_models)}")
    if text._attn_implementation == name:
        problems.append("MM-SP is on already; first call disable() of the object that enable_mm_sp returned")
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        problems.append(
            f"{type(model).__name__} has no output layer without bias; use the model's class ...ForCausalLM"
        )
    problems += language_problems(text, ulysses)
    if problems:
        raise ValueError(f"MM-SP cannot run this {type(model).__name__}: " + "; ".join(problems))


def check_unchanged(model: Any, layer: nn.Linear, implementation: str, name: str) -> None:
    """Raise ``ValueError`` unless the model still has output layer ``layer``, whose loss MM-SP computes, and attention ``name``,
    which sees the other ranks' tokens, and not another ``implementation``."""
    if implementation != name:
        raise ValueError(
            f"attn_implementation={implementation} was set while MM-SP is on, and would attend to the tokens of each rank alone; "
            "call set_attn_implementation before enable_mm_sp"
        )
    if model.get_output_embeddings() is not layer:
        raise ValueError(
            "the output layer was replaced while MM-SP is on; call resize_token_embeddings before enable_mm_sp, and put no "
            "adapter on the output layer"
        )


def check_call(args: tuple, kwargs: Mapping[str, Any], row_class: type) -> None:
    """Raise ``ValueError`` unless the model is called with a batch of the collator, whose ``mm_sp_row`` is a ``row_class``."""
    if not isinstance(kwargs.get("mm_sp_row"), row_class):
        raise ValueError(
            "MM-SP is on, and this call has no mm_sp_row: call model(**batch) with a batch of mm_sp.collator(), "
            "or model.generate, or give whole sequences under `with mm_sp.paused():`"
        )
    if args:
        raise ValueError(f"{len(args)} positional arguments: call model(**batch)")
    # TRL's head scores the labels of the collator, which are shifted already.
    is_scored = bool(kwargs.get("fused_lm_head"))
    given = [k for k, v in kwargs.items() if k in _CURE and _is_set(k, v) and not (is_scored and k == "shift_labels")]
    if given:
        raise ValueError(refusal_of(given))


def check_layout(row: Any, grid: GridShape, rank: int) -> None:
    """Raise ``ValueError`` unless ``row`` was made by the collator of rank ``rank`` of ``grid``."""
    if (row.grid, row.rank) != (grid, rank):
        made, own = (f"rank {r} of ulysses={g.ulysses}, ring={g.ring}" for g, r in ((row.grid, row.rank), (grid, rank)))
        raise ValueError(f"this batch was made for {made}, and the model runs as {own}; use the mm_sp.collator() of this model")


def check_whole(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a rank's share of a row: the stock model would silently take it for a whole sequence."""
    if "mm_sp_row" in kwargs:
        raise ValueError(
            "MM-SP is paused, and this batch of mm_sp.collator() holds only a share of its samples: call the model outside of "
            "`with mm_sp.paused():`, or give whole sequences"
        )


def check_token(args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the model is called as ``generate`` calls it for a token, with one of its caches."""
    ids = kwargs.get("input_ids")
    if args or ids is None or tuple(ids.shape) != (1, 1) or kwargs.get("labels") is not None:
        given = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
        raise ValueError(
            f"a call with a cache of MM-SP takes one token and nothing to learn, not {given}; call model.generate, "
            "which reads prompts"
        )


def refusal_of(keys: Iterable[str]) -> str:
    """The message about arguments that MM-SP does not take, each with its cure."""
    return "MM-SP does not take " + "; ".join(f"{key} ({_CURE[key]})" for key in keys)


def _is_set(key: str, value: Any) -> bool:
    if key == "return_dict":
        return value is False
    return not (value is None or value is False or (isinstance(value, int) and value == 0))

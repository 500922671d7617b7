"""The arguments of ``model.generate`` while MM-SP is on: what it takes and refuses, and whether all ranks were given the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from megatron_vila.hf.mm_sp.adapters import VISION_KEYS, VisionAdapter
from megatron_vila.hf.mm_sp.cache import ShardedCache

_TAKEN = {
    "input_ids", "attention_mask", "past_key_values", "logits_processor", "stopping_criteria", "streamer", "tokenizer",
    "prefix_allowed_tokens_fn", "synced_gpus",
}  # fmt: skip
_MAY_DIFFER = {"logits_processor", "stopping_criteria", "streamer", "prefix_allowed_tokens_fn", "max_time"}
"""Scores and stops are the first rank's, and a streamer takes what its own rank gets."""

_ASSISTED = "assisted decoding takes tokens back; leave it out"
_SEARCHES = "only greedy search and sampling run here; leave it out"
_CURE_OF_SETTING = {
    "num_beams": "only greedy search and sampling run here; set num_beams=1",
    "num_return_sequences": "one prompt gets one answer; call generate once for each",
    "num_beam_groups": _SEARCHES,
    "constraints": _SEARCHES,
    "force_words_ids": _SEARCHES,
    "penalty_alpha": _SEARCHES,
    "dola_layers": _SEARCHES,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "is_assistant": _ASSISTED,
    "guidance_scale": "it runs the model on a second prompt; leave it out",
    "use_cache": "each token would read the whole prompt again; set use_cache=True",
    "cache_implementation": "the cache is that of mm_sp.cache(), which grows and may be fp8; leave it out",
    "cache_config": "the cache is that of mm_sp.cache(), which grows and may be fp8; leave it out",
    "token_healing": "it changes the prompt; leave it out",
    "output_attentions": "no attention weights are formed; leave it out",
    "output_hidden_states": "no rank has those of the whole prompt; leave it out",
}
_CURE_OF_ARGUMENT = {
    "assistant_model": _ASSISTED,
    "assistant_tokenizer": _ASSISTED,
    "custom_generate": _SEARCHES,
    "negative_prompt_ids": _CURE_OF_SETTING["guidance_scale"],
    "negative_prompt_attention_mask": _CURE_OF_SETTING["guidance_scale"],
    "inputs_embeds": "give input_ids",
    "position_ids": "positions count from the start of input_ids; leave it out",
    "mm_encoder_outputs": "give pixels",
}
_ALLOWED: dict[str, tuple] = {
    "num_beams": (1,), "num_return_sequences": (1,), "num_beam_groups": (1,), "guidance_scale": (1, 1.0), "use_cache": (True,),
    "cache_implementation": ("dynamic",), "penalty_alpha": (0, 0.0),
}  # fmt: skip


class Settings:
    """Values of generation settings, by name: of the call, else of its configuration, else of the model's."""

    def __init__(self, model: GenerationConfig, given: GenerationConfig | None, call: Mapping[str, Any]) -> None:
        self._model, self._given, self._call = model, given, call

    def __getitem__(self, name: str) -> Any:
        if name in self._call:
            return self._call[name]
        value = getattr(self._given, name, None)
        return getattr(self._model, name, None) if value is None else value

    def new_tokens(self, prompt_tokens: int) -> int:
        """The most tokens that will be decoded, as far as that is set; Transformers' 20 if not."""
        if self["max_new_tokens"] is not None:
            return self["max_new_tokens"]
        return max(20, (self["max_length"] or 0) - prompt_tokens)

    def as_text(self) -> str:
        return "" if self._given is None else json.dumps(self._given.to_dict(), sort_keys=True, default=repr)


def check_generate(
    call: Mapping[str, Any], settings: Settings, adapter: VisionAdapter | None, window: int | None = None
) -> None:
    """Raise ``ValueError`` that lists everything in a call of ``generate`` that MM-SP cannot do.

    ``adapter`` is None for a text model, ``window`` the shortest sliding window of the model.
    """
    given = {name: value for name, value in call.items() if value is not None}
    problems = [f"{name} ({_CURE_OF_ARGUMENT[name]})" for name in given if name in _CURE_OF_ARGUMENT]
    for name, cure in _CURE_OF_SETTING.items():
        value = settings[name]
        if value not in (None, False, *_ALLOWED.get(name, ())) or (name == "use_cache" and value is False):
            problems.append(f"{name}={value} ({cure})")
    taken = _TAKEN | set(vars(GenerationConfig()))
    if adapter is not None:
        taken |= {*adapter.keys, *adapter.ignored, *adapter.options}
    for name in sorted(set(given) - taken - set(_CURE_OF_ARGUMENT) - set(_CURE_OF_SETTING)):
        if adapter is not None and name in adapter.hints:
            problems.append(f"{name} ({adapter.hints[name]})")
        else:
            is_vision = adapter is None and name in VISION_KEYS
            reason = "the model takes text only" if is_vision else "no argument of generate"
            problems.append(f"{name} ({reason}; leave it out)")
    chunk = settings["prefill_chunk_size"]
    if chunk is not None and chunk < 1:
        problems.append(f"prefill_chunk_size={chunk} (use 1 or more tokens)")
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, ShardedCache):
        problems.append(f"past_key_values of {type(cache).__name__} (each rank keeps its part in one of mm_sp.cache())")
    if not problems:
        problems = _prompt_problems(given, settings, adapter, window)
    if problems:
        raise ValueError(
            "generate under MM-SP does not take " + "; ".join(problems)
            + ". With whole sequences on each process it runs under `with mm_sp.paused():`"
        )  # fmt: skip


def _prompt_problems(
    given: Mapping[str, Any], settings: Settings, adapter: VisionAdapter | None, window: int | None
) -> list[str]:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None:
        return ["a call without input_ids (give the token ids of the prompt, [1, tokens])"]
    if ids.dim() != 2 or ids.shape[1] < 1:
        return [f"input_ids of shape {tuple(ids.shape)} (give one prompt, [1, tokens])"]
    if len(ids) > 1:
        return [f"input_ids of {len(ids)} prompts (all ranks share one; call generate once for each)"]
    if mask is not None and tuple(mask.shape) != tuple(ids.shape):
        return [
            f"an attention_mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)} (give the whole prompt "
            "in input_ids; what a cache holds of it is not read again)"
        ]
    if mask is not None and not bool((mask == 1).all()):
        return ["an attention_mask with zeros (take the padding out of input_ids)"]
    padding = settings["pad_token_id"]
    is_own = padding is not None and padding not in np.atleast_1d(settings["eos_token_id"])
    if mask is None and is_own and bool((ids == padding).any()):
        return [f"input_ids with padding, token {padding} (take it out, or give an attention_mask of ones if it is none)"]
    if adapter is not None and int(ids[0, -1]) in adapter.token_ids:
        return ["a prompt that ends with a picture or a video (put the question after it)"]
    # The last token that is decoded is not read any more.
    read = ids.shape[1] + settings.new_tokens(ids.shape[1]) - 1
    if window is not None and read > window:
        return [
            f"a sequence of {read} tokens in a model with sliding_window={window}, since its cache keeps and attends to all "
            "tokens (use a shorter prompt or fewer new tokens)"
        ]
    return []


def summary(call: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    """What must be the same on all ranks that share a prompt, a short text for each argument."""
    told = {name: _told(value) for name, value in call.items() if value is not None and name not in _MAY_DIFFER}
    return told | {"generation_config": settings.as_text()}


def _told(value: Any) -> str:
    if isinstance(value, ShardedCache):
        return _digest(value.token_ids)
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape)) if value.is_floating_point() else _digest(value.cpu().numpy())
    if isinstance(value, str | int | float):
        return repr(value)
    if isinstance(value, Sequence):
        return f"{len(value)} of {[len(part) for part in value if hasattr(part, '__len__')]}"
    return type(value).__name__


def _digest(values: np.ndarray) -> str:
    return f"{values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"


def check_alike(told: Sequence[Mapping[str, str]]) -> None:
    """Raise ``ValueError`` unless ``summary`` told the same on all ranks that share a prompt."""
    names = sorted({name for one in told for name in one if any(one[name] != other.get(name) for other in told)})
    if names:
        raise ValueError(
            f"{', '.join(names)}: not the same on the {len(told)} ranks that share a prompt; call generate alike on all of them"
        )

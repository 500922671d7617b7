"""The largest value of each number in the configuration: above it a value is a slip of the keyboard, not a setting.

A typo such as ``data.prefetch=1e9`` would fill the memory, hang or overflow long after the start. The bounds lie far above
everything that has been trained; a key without a bound of its own gets the general one of its type.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Any

from megatron_vila.config.keys import config_keys
from megatron_vila.config.schema import Config

LARGEST_WHOLE_NUMBER = 10**9
LARGEST_NUMBER = 1e12

MOST: dict[str, float] = {
    "model.init_std": 100,
    "model.lora.alpha": 1e6,
    "model.lora.rank": 65536,
    "model.vision.ffn_hidden_size": 2**20,
    "model.vision.frame_micro_batch": 65536,
    "model.vision.hidden_size": 2**17,
    "model.vision.image_size": 16384,
    "model.vision.layer_norm_eps": 1,
    "model.vision.num_heads": 4096,
    "model.vision.num_layers": 1024,
    "model.vision.patch_size": 16384,
    "model.llm.ffn_hidden_size": 2**20,
    "model.llm.head_dim": 4096,
    "model.llm.hidden_size": 2**17,
    "model.llm.max_positions": 2**30,
    "model.llm.norm_eps": 1,
    "model.llm.num_heads": 4096,
    "model.llm.num_kv_heads": 4096,
    "model.llm.num_layers": 1024,
    "model.llm.rope_scaling_factor": 1e6,
    "model.llm.vocab_size": 2**24,
    "parallel.gpus_per_node": 4096,
    "parallel.pp": 1024,
    "parallel.ring": 65536,
    "parallel.tp": 1024,
    "parallel.ulysses": 4096,
    "parallel.ulysses_chunks": 4096,
    "memory.block_layers": 1024,
    "memory.mlp_tile": 2**28,
    "memory.offload_gib": 65536,
    "data.cache_gib": 2**20,
    "data.fps": 1000,
    "data.host_memory_gib": 65536,
    "data.num_frames": 10**6,
    "data.prefetch": 4096,
    "data.workers": 1024,
    "optim.eps": 1,
    "optim.llm.lr": 1,
    "optim.lr": 1,
    "optim.min_lr": 1,
    "optim.projector.lr": 1,
    "optim.vision.lr": 1,
    "optim.weight_decay": 100,
    "train.global_batch_size": 10**6,
    "train.seed": 2**32 - 1,
    "train.seq_length": 2**28,
    "train.timeout_minutes": 1e5,
}
"""Largest meaningful value by key."""

MOST_RANKS = 2**20
"""Largest world size."""


def most(name: str, kind: Any) -> float | None:
    """The largest value of the key ``name`` of the type ``kind``; None for what is not a number."""
    options = set(typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind])
    if not options & {int, float}:
        return None
    return MOST.get(name, LARGEST_NUMBER if float in options else LARGEST_WHOLE_NUMBER)


def size_problems(config: Config) -> Iterable[str]:
    """Numbers that are too large in size, infinite or not a number, each with its bound."""
    for key in config_keys():
        value, bound = value_of(config, key.name), most(key.name, key.type)
        if bound is None or value is None:
            continue
        if value != value:
            yield f"{key.name}=nan is not a number; give one"
        elif abs(value) > bound:
            given = str(value) if isinstance(value, float) or abs(value) < 10**40 else "a number of more than 40 digits"
            yield f"{key.name}={given} must be a mistake; use at most {shown(bound)}"


def text_problems(config: Config) -> Iterable[str]:
    """Texts that no file system takes as a name."""
    for key in config_keys():
        value = value_of(config, key.name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                yield f"{key.name}={text!r} holds a zero byte; remove it"


def value_of(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def shown(bound: float) -> str:
    return f"{bound:g}" if bound != int(bound) or bound >= 1e10 else str(int(bound))

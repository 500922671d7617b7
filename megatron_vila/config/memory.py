"""An honest first estimate of the memory that a rank needs, before anything is started.

It counts what grows with the configuration: weights, gradients, optimizer state (sharded over dp*cp by Megatron's
distributed optimizer), the saved activations of the local S/(cp*tp) tokens and of the local frames. Of the
logits only one chunk exists at a time. Not counted: kernel workspaces, communication buffers, fragmentation; ``SLACK_BYTES``
stands for them on a GPU. Saved activations per token and layer follow from what the operators of a pre-norm SwiGLU layer keep
(Korthikanti et al., arXiv 2205.05198, section 4, without dropout and without the attention matrix).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_vila.config.schema import Config, LanguageConfig, VisionConfig
from megatron_vila.config.sizes import (
    head_dim,
    llm_layer_parameters,
    parameter_count,
    patches_per_frame,
    tokens_per_frame,
    vision_layers_run,
)

GIB = 2**30

LOGIT_CHUNK_TOKENS = 4096
"""Tokens that the fused loss scores at once (``models/head.py``)."""

SLACK_BYTES = 2 * GIB
"""CUDA context, communication buffers and workspaces of a GPU rank."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    llm_activations: int
    vision_activations: int
    slack: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def element_bytes(precision: str, on_gpu: bool) -> int:
    """Bytes of a weight or activation; ``auto`` is bf16 on a GPU and fp32 on a CPU."""
    return {"bf16": 2, "fp32": 4, "fp64": 8, "auto": 2 if on_gpu else 4}[precision]


def estimate_memory(config: Config, world_size: int, on_gpu: bool) -> MemoryEstimate:
    """The fullest pipeline stage's rank. The layout must divide ``world_size`` (``validate`` checks it first)."""
    parallel, optim = config.parallel, config.optim
    cp = parallel.ulysses * parallel.ring
    dp = world_size // (parallel.tp * parallel.pp * cp)
    element = element_bytes(config.train.precision, on_gpu)
    held, trained = _stage_parameters(config)
    grad_bytes = max(element, 4 if optim.grad_reduce_fp32 else element)
    # Adam's two moments, and a float32 master copy where the weights are bf16.
    state_bytes = 2 * max(element, 4) + (4 if element == 2 else 0)
    return MemoryEstimate(
        weights=held * element,
        gradients=trained * grad_bytes,
        optimizer=trained * state_bytes // (dp * cp),
        llm_activations=_llm_activations(config, cp, dp, element),
        vision_activations=_vision_activations(config, cp, dp, element),
        slack=SLACK_BYTES if on_gpu else 0,
    )


def memory_of_rank(local_ranks: int) -> tuple[int, str]:
    """Bytes a rank may use here and where the number comes from: its GPU, or its share of the machine's memory."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.total_memory, f"a GPU ({device.name})"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // local_ranks, f"each of {local_ranks} processes on this machine"


def _stage_parameters(config: Config) -> tuple[int, int]:
    """Parameters held and trained by a rank of the fullest pipeline stage."""
    model, parallel, optim = config.model, config.parallel, config.optim
    counts = parameter_count(model)
    layers = model.llm.num_layers // parallel.pp * llm_layer_parameters(model.llm) // parallel.tp
    table = model.llm.vocab_size * model.llm.hidden_size // parallel.tp
    # Tower and projector are replicated over tensor parallelism.
    pictures = counts["vision"] + counts["projector"]
    pictures_trained = counts["vision"] * optim.vision.trainable + counts["projector"] * optim.projector.trainable
    tables = 1 if model.llm.tie_embeddings or parallel.pp > 1 else 2
    first = layers + tables * table
    return pictures + first, pictures_trained + first * optim.llm.trainable


def _llm_activations(config: Config, cp: int, dp: int, element: int) -> int:
    llm, parallel = config.model.llm, config.parallel
    tokens = -(-config.train.seq_length // (cp * parallel.tp))
    layers = llm.num_layers // parallel.pp
    working = tokens * layer_activation_elements(llm) * element
    # Sequence parallelism gathers one layer's input; the loss holds one chunk of float32 logits and its gradient.
    gathered = tokens * parallel.tp * llm.hidden_size * element if parallel.tp > 1 else 0
    scored = min(LOGIT_CHUNK_TOKENS, tokens * parallel.tp)
    transient = max(gathered, 2 * scored * llm.vocab_size // parallel.tp * max(element, 4))
    # The first stage of 1F1B holds the activations of up to pp micro-batches.
    in_flight = min(parallel.pp, max(1, config.train.global_batch_size // dp))
    if config.model.recompute == "full":
        return in_flight * layers * tokens * llm.hidden_size * element + working + transient
    return in_flight * layers * working + transient


def layer_activation_elements(llm: LanguageConfig) -> int:
    """Elements per token that one decoder layer saves for its backward pass (per token of S/(cp*tp))."""
    heads, kv = llm.num_heads * head_dim(llm), llm.num_kv_heads * head_dim(llm)
    norms = 4 * llm.hidden_size
    attention = 2 * heads + 2 * kv
    mlp = 3 * llm.ffn_hidden_size
    return norms + attention + mlp


def _vision_activations(config: Config, cp: int, dp: int, element: int) -> int:
    vision = config.model.vision
    per_frame = tokens_per_frame(config.model)
    in_row = config.train.seq_length // per_frame
    frames = in_row if config.data.packing else min(in_row, config.data.num_frames)
    local = -(-frames // (cp * config.parallel.tp))
    patches = patches_per_frame(vision)
    per_patch = vision_layers_run(vision) * vision_activation_elements(vision)
    micro_batch = min(local, vision.frame_micro_batch)
    if not config.optim.vision.trainable:
        return micro_batch * patches * vision_activation_elements(vision) * element
    in_flight = min(config.parallel.pp, max(1, config.train.global_batch_size // dp))
    saved = micro_batch if vision.recompute else local * in_flight
    return saved * patches * per_patch * element


def vision_activation_elements(vision: VisionConfig) -> int:
    """Elements per patch that one tower layer saves for its backward pass."""
    return 8 * vision.hidden_size + 2 * vision.ffn_hidden_size

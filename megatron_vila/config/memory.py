"""A prediction of the memory that a rank needs, before anything is started.

It counts what grows with the configuration: weights, gradients, optimizer state (sharded over dp*cp by Megatron's
distributed optimizer), what the recompute policy keeps of the local S/cp tokens from forward to backward pass, what the layer in
work needs on top, and the local frames. ``SLACK_BYTES`` stands for the CUDA context, communication buffers and fragmentation.
What an operation keeps follows from the code (``models/fused.py``, ``models/mlp.py``, ``parallel/attention2d.py``) and is checked
in the tests against what autograd really saves.

Legend: s tokens of a CP rank (S/cp), H hidden size, F width of the MLP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_vila.config.schema import Config, VisionConfig
from megatron_vila.config.sizes import (
    head_dim,
    linear_shapes,
    llm_layer_parameters,
    lora_layer_parameters,
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
    workspace: int
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
        llm_activations=_llm_activations(config, dp, element),
        vision_activations=_vision_activations(config, cp, dp, element),
        workspace=max(_layer_workspace(config, element), _head_workspace(config, element)),
        slack=SLACK_BYTES if on_gpu else 0,
    )


def host_memory() -> int:
    """Bytes of this machine's memory that are free or can be freed, within the container's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return available


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
    num_layers = model.llm.num_layers // parallel.pp
    layers = num_layers * llm_layer_parameters(model.llm) // parallel.tp
    table = model.llm.vocab_size * model.llm.hidden_size // parallel.tp
    # Tower and projector are replicated over tensor parallelism.
    pictures = counts["vision"] + counts["projector"]
    pictures_trained = counts["vision"] * optim.vision.trainable + counts["projector"] * optim.projector.trainable
    tables = 1 if model.llm.tie_embeddings or parallel.pp > 1 else 2
    first = layers + tables * table
    learns = first
    if model.lora.rank:
        learns = num_layers * lora_layer_parameters(model, parallel.tp)
        first += learns
        learns += table * ("embeddings" in model.lora.also_train)
        learns += (2 * num_layers + 1) * model.llm.hidden_size * ("norms" in model.lora.also_train)
    return pictures + first, pictures_trained + learns * optim.llm.trainable


def _llm_activations(config: Config, dp: int, element: int) -> int:
    """What the decoder layers of this rank hold on the device between forward and backward pass."""
    parallel = config.parallel
    layers = config.model.llm.num_layers // parallel.pp
    # The first stage of 1F1B holds the activations of up to pp micro-batches.
    in_flight = min(parallel.pp, max(1, config.train.global_batch_size // dp))
    kept = in_flight * _local_tokens(config) * kept_bytes_per_token(config, layers, element)
    return max(0, kept - int(config.memory.offload_gib * GIB))


def kept_bytes_per_token(config: Config, layers: int, element: int) -> int:
    """Bytes per token of a CP rank that ``layers`` decoder layers keep from forward to backward pass under the policy."""
    llm, tp, memory = config.model.llm, config.parallel.tp, config.memory
    heads = llm.num_heads // tp
    log_sum_exp = heads * max(element, 4)
    if memory.recompute == "none":
        return layers * (layer_elements(config) * element + log_sum_exp + _norm_scales(tp, element))
    inputs = llm.hidden_size // tp * element
    if memory.recompute == "full":
        return layers * inputs
    return layers * (heads * head_dim(llm) * element + log_sum_exp) + -(-layers // memory.block_layers) * inputs


def layer_elements(config: Config) -> int:
    """Elements per token of a CP rank that one layer saves when nothing is recomputed: inputs of the norms and of linear layers
    that learn, q, k, v, attention's output (twice where the Ulysses exchange makes a copy), gate and up and their product, inner
    values of LoRA's updates."""
    llm, lora, tp = config.model.llm, config.model.lora, config.parallel.tp
    q, kv = llm.num_heads * head_dim(llm), llm.num_kv_heads * head_dim(llm)
    learning = set(lora.targets if lora.rank else linear_shapes(llm)) if config.optim.llm.trainable else set()
    tiled = 0 < config.memory.mlp_tile < _local_tokens(config) // tp
    hidden = 2 + ("qkv" in learning) + (tiled or "fc1" in learning)
    outputs = 2 if config.parallel.ulysses > 1 and "proj" in learning else 1
    mlp = 0 if tiled else (2 + ("fc2" in learning)) * llm.ffn_hidden_size
    # Updates of column-parallel layers (qkv, fc1) keep theirs for the tokens of all tp ranks.
    per_update = {"qkv": tp, "proj": 1} | ({} if tiled else {"fc1": tp, "fc2": 1})
    inner = lora.rank * sum(size for name, size in per_update.items() if name in learning)
    return (hidden * llm.hidden_size + (1 + outputs) * q + 2 * kv + mlp + inner) // tp


def _norm_scales(tp: int, element: int) -> int:
    return 2 * max(element, 4) // tp


def _local_tokens(config: Config) -> int:
    cp = config.parallel.ulysses * config.parallel.ring
    return -(-config.train.seq_length // cp)


def _layer_workspace(config: Config, element: int) -> int:
    """The layer in work: its own activations where they were not kept, its rebuilt neighbours, the MLP's gradients, and the
    gathered tokens of sequence parallelism."""
    llm, tp, memory = config.model.llm, config.parallel.tp, config.memory
    tokens = _local_tokens(config)
    in_tile = min(tokens, memory.mlp_tile * tp) if memory.mlp_tile else tokens
    # A tile holds gate, up and product, and the gradients of all three.
    mlp = in_tile * 6 * llm.ffn_hidden_size // tp * element
    gathered = tokens * llm.hidden_size * element if tp > 1 else 0
    streams = 4 * tokens * llm.hidden_size // tp * element
    if memory.recompute == "none":
        return mlp + gathered + streams
    rebuilt = (memory.block_layers - 1) * tokens * llm.hidden_size // tp * element
    tiled = 0 < memory.mlp_tile < tokens // tp
    saved = tokens * layer_elements(config) * element
    return saved + rebuilt + gathered + streams + (mlp if tiled else mlp // 2)


def _head_workspace(config: Config, element: int) -> int:
    """One chunk of float32 logits and its gradient."""
    scored = min(LOGIT_CHUNK_TOKENS, _local_tokens(config))
    return 2 * scored * config.model.llm.vocab_size // config.parallel.tp * max(element, 4)


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

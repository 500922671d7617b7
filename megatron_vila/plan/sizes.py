"""Sizes that follow from a model's configuration: parameters of each part, head size.

Pure arithmetic, checked in the tests against published checkpoints. Weight names and shapes: SigLIP so400m, VILA's
projectors and Hugging Face's Llama and Qwen2.
"""

from __future__ import annotations

import math

from megatron_vila.config.schema import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.plan.geometry import POOL_SIDE, patches_per_square

PROJECTOR_TYPES = tuple(POOL_SIDE)

VOCAB_MULTIPLE = 64
"""The embedding table is padded to a multiple of this (and of tp), so that checkpoints fit every usual tp."""


def parameter_count(model: ModelConfig) -> dict[str, int]:
    """Parameters of ``vision``, ``projector``, ``llm`` and ``total``, as in the checkpoint (no padding of the vocabulary)."""
    counts = {
        "vision": vision_parameters(model.vision),
        "projector": projector_parameters(model.projector, model.vision.hidden_size, model.llm.hidden_size),
        "llm": llm_parameters(model.llm),
    }
    return counts | {"total": sum(counts.values())}


def vision_parameters(vision: VisionConfig) -> int:
    """Parameters of the SigLIP tower, the unused last layers, post-layernorm and pooling head included."""
    h, f = vision.hidden_size, vision.ffn_hidden_size
    embeddings = 3 * vision.patch_size**2 * h + h + patches_per_square(vision) * h
    norm = 2 * h
    attention = 4 * (h * h + h)
    mlp = (h * f + f) + (f * h + h)
    head = h + attention + norm + mlp if vision.use_head else 0
    return embeddings + vision.num_layers * (2 * norm + attention + mlp) + norm + head


def projector_parameters(projector: ProjectorConfig, vision_hidden: int, llm_hidden: int) -> int:
    """Parameters of a projector from ``vision_hidden`` (C) to ``llm_hidden`` (H); ``KeyError`` for an unknown type."""
    c, h = vision_hidden, llm_hidden
    if projector.type == "linear":
        return c * h + h
    if projector.type == "mlp2x_gelu":
        return (c * h + h) + (h * h + h)
    cell = POOL_SIDE[projector.type] ** 2 * c
    if projector.type == "mlp_downsample_3x3_fix":
        return 2 * cell + (cell * 3 * c + 3 * c) + 2 * 3 * c + (3 * c * h + h) + (h * h + h)
    return 2 * cell + (cell * h + h) + (h * h + h)


def llm_parameters(llm: LanguageConfig) -> int:
    """Parameters of the language model, embedding table and output layer included."""
    table = llm.vocab_size * llm.hidden_size
    return table * (1 if llm.tie_embeddings else 2) + llm.num_layers * llm_layer_parameters(llm) + llm.hidden_size


def llm_layer_parameters(llm: LanguageConfig) -> int:
    """Parameters of one decoder layer."""
    shapes = linear_shapes(llm)
    bias = shapes["qkv"][0] if llm.qkv_bias else 0
    return sum(outputs * inputs for outputs, inputs in shapes.values()) + bias + 2 * llm.hidden_size


def linear_shapes(llm: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of a decoder layer, by their names in ``model.lora.targets``, as they run."""
    h, f, d = llm.hidden_size, llm.ffn_hidden_size, head_dim(llm)
    q, kv = llm.num_heads * d, llm.num_kv_heads * d
    return {"qkv": (q + 2 * kv, h), "proj": (h, q), "fc1": (2 * f, h), "fc2": (h, f)}


def lora_layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Parameters of the LoRA updates of one decoder layer on a tensor-parallel rank: the factor beside the split side of the
    weight is split as it is, the other one is whole."""
    shapes, lora = linear_shapes(model.llm), model.lora
    if not lora.rank:
        return 0
    split = {"qkv": (tp, 1), "proj": (1, tp), "fc1": (tp, 1), "fc2": (1, tp)}
    sides = [size // parts for name in lora.targets for size, parts in zip(shapes[name], split[name], strict=True)]
    return lora.rank * sum(sides)


def head_dim(llm: LanguageConfig) -> int:
    """Size of an attention head."""
    return llm.head_dim if llm.head_dim is not None else llm.hidden_size // llm.num_heads


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding table over all tensor-parallel ranks; no token reaches those from ``vocab_size`` on."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp)
    return -(-vocab_size // multiple) * multiple


def vision_layers_run(vision: VisionConfig) -> int:
    """Tower layers that are run: ``select_layer`` counts hidden_states, of which the first is the embedding output."""
    states = vision.num_layers + 1
    assert -states <= vision.select_layer < states, vision
    return vision.select_layer % states

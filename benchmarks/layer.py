"""Decoder layers alone: forward and backward pass, no embedding, no head, no optimizer.

``method`` is ``mmsp`` (this project) or, with Transformer Engine installed, Megatron-Core's own layers and context parallelism:
``megatron_p2p`` and ``megatron_a2a`` with cp = ulysses * ring, ``megatron_tp`` without cp, with the fusions that Megatron-LM's
training script has by default; ``megatron_mmsp`` is those layers with this project's attention inside. One document, every token
trained, weights in bfloat16 on a GPU. As in training, products add the gradients of weights to buffers that are there from the
start (float32, or with ``optim.grad_reduce_fp32=false`` the weights' dtype). ``swiglu=apart`` is without the products that have
SwiGLU inside.

Settings: ``config``, ``overrides``, ``layers``.

Legend: t tokens of this rank (S/(cp*tp)), H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlock

from benchmarks.predicted import decoder_alone
from benchmarks.table import rates
from benchmarks.worker import measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config, MemoryConfig, ParallelConfig
from megatron_vila.models.decoder.decoder import run_decoder
from megatron_vila.models.decoder.saved import HostStore
from megatron_vila.models.language import attention_kernel, build_language_model, core_attention, transformer_config
from megatron_vila.parallel.attention2d import RowIndices
from megatron_vila.parallel.megatron_attention import MMSPAttention, RowParams
from megatron_vila.parallel.rope import rotary_angles
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.row_plan import AttentionPlan
from megatron_vila.plan.sizes import head_dim
from megatron_vila.plan.tokens import local_positions

MEGATRON = {"megatron_p2p": "p2p", "megatron_a2a": "a2a", "megatron_tp": None, "megatron_mmsp": None}
VARIANT = {
    "tp": 1, "ulysses": 1, "ulysses_chunks": 1, "ring": 1, "attention": "auto", "method": ("mmsp", *MEGATRON),
    "recompute": "none", "block_layers": 1, "recompute_layers": 0, "mlp_tile": 0, "offload_gib": 0.0,
    "swiglu": ("inside", "apart"),
}  # fmt: skip


def rows(settings: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """That of the variant ``text``."""
    variant, length = parse_variant(text, VARIANT), settings["length"]
    config = config_of(settings, variant, length)
    topology = ParallelTopology.create(config.parallel)
    model_parallel_cuda_manual_seed(1)
    device, dtype = accelerator.device(), accelerator.dtype_of("auto")
    hidden = torch.randn(
        length // topology.grid.encoders, 1, config.model.llm.hidden_size, device=device, dtype=dtype
    ).requires_grad_()
    build = our_layers if variant["method"] == "mmsp" else _megatron
    attention, decoder, run = build(config, variant, topology)
    dout = torch.randn_like(hidden)
    learned = list(decoder.parameters())
    for parameter in learned:
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32 if config.optim.grad_reduce_fp32 else None)

    def step():
        for x in (hidden, *learned):
            x.grad = None
        run(hidden).backward(dout)

    found = measure(step, settings["warmup"], settings["timed"])
    flops = model_flops([length], 0, (), config.model, config.optim).total * topology.grid.dp
    topology.destroy()
    row = {
        "model": f"{config.model.name}, {settings['layers']} layers",
        "part": "both",
        **{axis: variant[axis] for axis in ("tp", "ulysses", "ring")},
        "attention": attention,
        "seq_len": length,
        **rates(flops / found.seconds / dist.get_world_size()),
        **found.columns(decoder_alone(config, dtype.itemsize) if variant["method"] == "mmsp" else None),
    }
    return [row]


def config_of(settings: dict[str, Any], variant: dict[str, Any], length: int) -> Config:
    """The configuration that is measured: ``config``, ``overrides`` and ``layers`` of ``settings``, and the parsed variant."""
    config = load_config(settings["config"], settings["overrides"])
    config.model.llm.num_layers, config.model.attention = settings["layers"], variant["attention"]
    config.parallel = ParallelConfig(**{axis: variant[axis] for axis in ("tp", "ulysses", "ulysses_chunks", "ring")})
    policy = ("recompute", "block_layers", "recompute_layers", "mlp_tile", "offload_gib")
    config.memory = MemoryConfig(**{name: variant[name] for name in policy})
    config.train.seq_length = length
    return config


Layers = tuple[str, torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]
"""The kernel of attention, the layers, and their call on the hidden states of this rank's tokens."""


def our_layers(config: Config, variant: dict[str, Any], topology: ParallelTopology) -> Layers:
    """``build_language_model``'s."""
    grid, llm, device, dtype = topology.grid, config.model.llm, accelerator.device(), accelerator.dtype_of("auto")
    stock = transformer_config(config.model, topology, dtype)
    settings = {"mlp_tile": config.memory.mlp_tile, "ulysses_chunks": config.parallel.ulysses_chunks}
    settings |= {"swiglu_inside": variant["swiglu"] == "inside"}
    decoder = build_language_model(config.model, stock, topology, device, **settings).decoder.to(device, dtype)
    document = np.array([0, config.train.seq_length])
    positions = torch.from_numpy(local_positions(document, grid.cp, topology.grid.cp_rank(topology.rank))).to(device)
    angles = rotary_angles(positions, head_dim(llm), llm.rope_theta, llm.rope_scaling_factor, dtype)
    row = RowParams(*angles, _row_indices(config, topology))
    host = HostStore(int(config.memory.offload_gib * GIB), device)
    return attention_kernel(decoder), decoder, lambda hidden_t1H: run_decoder(decoder, hidden_t1H, row, config.memory, host)


def _megatron(config: Config, variant: dict[str, Any], topology: ParallelTopology) -> Layers:
    """Megatron-Core's GPT layers of Transformer Engine with its own context parallelism and choice of kernel, or with ours."""
    method = variant["method"]
    try:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
    except (ImportError, NameError, TypeError) as error:
        raise RuntimeError(f"method={method} needs Transformer Engine, which does not load here ({error})") from error
    stock = dataclasses.replace(
        transformer_config(config.model, topology, accelerator.dtype_of("auto")),
        cp_comm_type=MEGATRON[method],
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        persist_layer_norm=True,
        gradient_accumulation_fusion=True,
        hierarchical_context_parallel_sizes=None,
    )
    inside = method == "megatron_mmsp"
    if inside:
        put_attention_inside(spec, config, topology)
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.causal
    block, run = megatron_layers(spec, stock, config, topology)
    return attention_kernel(block) if inside else "", block, run


def megatron_layers(
    spec: ModuleSpec, stock: TransformerConfig, config: Config, topology: ParallelTopology
) -> tuple[TransformerBlock, Callable[[torch.Tensor], torch.Tensor]]:
    """Layers of ``spec`` as Megatron-Core runs them, and their call on a document of ``train.seq_length`` tokens."""
    llm, device = config.model.llm, accelerator.device()
    block = TransformerBlock(
        stock, spec, post_layer_norm=False, pre_process=True, post_process=False, pg_collection=topology.collection
    ).to(device, stock.params_dtype)
    rotary = RotaryEmbedding(head_dim(llm), rotary_percent=1.0, rotary_base=int(llm.rope_theta), cp_group=topology.cp)
    angles = rotary(config.train.seq_length).to(device)
    return block, lambda hidden_t1H: block(hidden_states=hidden_t1H, attention_mask=None, rotary_pos_emb=angles)


def put_attention_inside(spec: ModuleSpec, config: Config, topology: ParallelTopology) -> None:
    """Give Megatron's layers this project's attention, for a document of ``train.seq_length`` tokens."""
    device, chunks = accelerator.device(), config.parallel.ulysses_chunks
    inside = core_attention(
        _InsideMegatron, config.model, topology, device, chunks, indices=_row_indices(config, topology)
    )
    spec.submodules.self_attention.submodules.core_attention = inside


def _row_indices(config: Config, topology: ParallelTopology) -> RowIndices:
    document = np.array([0, config.train.seq_length])
    return RowIndices.of(AttentionPlan.of(document, topology.grid, topology.place.ring), accelerator.device())


class _InsideMegatron(MMSPAttention):
    """``MMSPAttention`` as Megatron's own layer calls it, which has turned queries and keys."""

    def __init__(self, *args, indices: RowIndices, **settings) -> None:
        super().__init__(*args, **settings)
        self._indices = indices

    def forward(self, query_s1HD, key_s1KD, value_s1KD, *_, **__) -> torch.Tensor:
        out_sHD = self.attention(*(x.squeeze(1) for x in (query_s1HD, key_s1KD, value_s1KD)), self._indices)
        return out_sHD.flatten(1).unsqueeze(1)

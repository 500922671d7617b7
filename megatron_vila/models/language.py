"""The language model: Megatron-Core's GPT in Llama-3 and Qwen2 shape with MM-SP attention.

Only this file makes a ``GPTModel`` and its ``TransformerConfig``; here both supported Megatron-Core versions are told apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_vila.config.schema import ModelConfig
from megatron_vila.models.decoder.linear import ColumnLinear, RowLinear
from megatron_vila.models.decoder.lora import add_low_rank
from megatron_vila.models.decoder.mlp import tiled
from megatron_vila.models.decoder.norm import RMSNorm
from megatron_vila.parallel.megatron_attention import MMSPAttention
from megatron_vila.parallel.peers import PeerMemory
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.sizes import head_dim, padded_vocab_size


def transformer_config(model: ModelConfig, topology: ParallelTopology, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's view of the language model on this grid.

    Losses are sums with token counts (``calculate_per_token_loss``): the only mode whose gradients do not depend on cp.
    """
    llm, grid = model.llm, topology.grid
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        num_attention_heads=llm.num_heads,
        num_query_groups=llm.num_kv_heads,
        kv_channels=head_dim(llm),
        ffn_hidden_size=llm.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=llm.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=llm.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        context_parallel_size=grid.cp,
        hierarchical_context_parallel_sizes=[grid.ulysses, grid.ring],
        sequence_parallel=grid.tp > 1,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,  # packed rows differ in length
        moe_token_dispatcher_type="alltoall",  # Megatron asks for it with variable lengths, experts or not
        batch_p2p_sync=False,
        gradient_accumulation_fusion=False,  # models/decoder/linear.py needs no extension for it
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def build_language_model(
    model: ModelConfig,
    config: TransformerConfig,
    topology: ParallelTopology,
    device: torch.device,
    *,
    mlp_tile: int,
    ulysses_chunks: int,
    deterministic: bool = False,
    swiglu_inside: bool = True,
) -> GPTModel:
    """This rank's part of the GPT: its tensor-parallel shard of its pipeline stage's layers.

    ``config`` is ``transformer_config`` of the same model and grid; the other settings are those of ``memory.mlp_tile``,
    ``parallel.ulysses_chunks``, ``train.deterministic`` and ``TiledMLP``.
    """
    llm = model.llm
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    self_attention = layer.submodules.self_attention.submodules
    self_attention.core_attention = core_attention(
        MMSPAttention, model, topology, device, ulysses_chunks, deterministic=deterministic
    )
    self_attention.linear_qkv, self_attention.linear_proj = ColumnLinear, RowLinear
    # Megatron's local norms refuse sequence parallelism.
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.mlp = tiled(layer.submodules.mlp, mlp_tile, swiglu_inside)
    add_low_rank(layer, model.lora)
    layers = get_num_layers_to_build(config, vp_stage=None, pp_rank=topology.place.pp)
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(llm.vocab_size, topology.grid.tp),
        max_sequence_length=llm.max_positions,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=llm.tie_embeddings,
        position_embedding_type="none",  # MMSPAttention turns queries and keys by the positions of the row
        pg_collection=topology.collection,
    )


def core_attention(
    kind: type[MMSPAttention], model: ModelConfig, topology: ParallelTopology, device: torch.device, ulysses_chunks: int, **more
) -> Callable[..., MMSPAttention]:
    """The ``core_attention`` of a layer spec: ``kind`` with the arguments of this grid and those in ``more``."""
    return functools.partial(
        kind,
        ulysses_group=topology.ulysses,
        ring_group=topology.ring,
        peers=PeerMemory.of(topology.ulysses, device),
        kernel_name=model.attention,
        ulysses_chunks=ulysses_chunks,
        device=device,
        **more,
    )


def attention_kernel(decoder: Any) -> str:
    """Name of the kernel that runs in the layers of ``decoder``; with ``auto`` the one that was chosen."""
    return decoder.layers[0].self_attention.core_attention.attention.ring.kernel.name

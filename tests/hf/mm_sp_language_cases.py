"""Language models of transformers with random weights and settings that are nobody's default."""

from __future__ import annotations

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ROPE = {"rope_type": "linear", "rope_theta": 700.0, "factor": 1.5}
GEMMA = {
    "query_pre_attn_scalar": 5,
    "head_dim": 6,
    "final_logit_softcapping": 2.5,
    "attention_bias": True,
    "pad_token_id": 3,
}
LANGUAGE = {
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 6, "sliding_window": 5, "rope_parameters": ROPE}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GEMMA | {"attn_logit_softcapping": None, "sliding_window": 4, "rope_parameters": ROPE},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GEMMA
        | {
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}},
        },
    ),
    "phi3": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            "hidden_size": 24,
            "sliding_window": 6,
            "pad_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.67},
        },
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "rope_parameters": ROPE,
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"attention_bias": True, "pad_token_id": 3, "rope_parameters": ROPE}),
    "glm4": (
        Glm4ForCausalLM,
        Glm4Config,
        {
            "head_dim": 8,
            "pad_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.75},
        },
    ),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "rope_parameters": ROPE},
    ),
}  # fmt: skip


def build_language(name: str, sizes: dict, **settings) -> PreTrainedModel:
    """The model ``name`` of ``sizes``, unless its own settings or ``settings`` say otherwise."""
    model, config, own = LANGUAGE[name]
    return model(config(**sizes | {"rms_norm_eps": 3e-4, "tie_word_embeddings": name == "gemma2"} | own | settings))

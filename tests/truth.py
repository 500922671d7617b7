"""The single-process truth: a VILA in plain PyTorch, one document after the other, full attention matrix, full logits.

It shares weights (by Megatron's names) and the vision modules with the project and nothing of its parallel layer: no
packing, no padding, no layout, no kernel, no fused head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megatron_vila.config.schema import ModelConfig
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, theta: float, factor: float) -> torch.Tensor:
    """[L, heads, D] at positions 0..L-1."""
    length, _, dim = x.shape
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64) / factor, frequency)[:, None]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one document; q [L, H, D], k and v [L, K, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def decoder_layer(x: torch.Tensor, weights: Mapping[str, torch.Tensor], layer: int, model: ModelConfig) -> torch.Tensor:
    llm = model.llm
    w = {name.split(f"layers.{layer}.")[1]: t for name, t in weights.items() if f"layers.{layer}." in name}
    dim = llm.head_dim or llm.hidden_size // llm.num_heads
    group = llm.num_heads // llm.num_kv_heads

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ w[f"{name}.weight"].T
        if f"{name}.lora_a" in w:
            y = y + model.lora.alpha / model.lora.rank * (x @ w[f"{name}.lora_a"].T @ w[f"{name}.lora_b"].T)
        return y

    qkv = linear(rms_norm(x, w["input_layernorm.weight"], llm.norm_eps), "self_attention.linear_qkv")
    if llm.qkv_bias:
        qkv = qkv + w["self_attention.linear_qkv.bias"]
    qkv = qkv.view(len(x), llm.num_kv_heads, group + 2, dim)
    q, k, v = qkv[:, :, :group].flatten(1, 2), qkv[:, :, group], qkv[:, :, group + 1]
    theta, factor = llm.rope_theta, llm.rope_scaling_factor
    out = attention(rotate(q, theta, factor), rotate(k, theta, factor), v)
    x = x + linear(out.flatten(1), "self_attention.linear_proj")
    gate, up = linear(rms_norm(x, w["pre_mlp_layernorm.weight"], llm.norm_eps), "mlp.linear_fc1").chunk(2, -1)
    return x + linear(nn.functional.silu(gate) * up, "mlp.linear_fc2")


def document_logits(
    weights: Mapping[str, torch.Tensor], model: ModelConfig, document: Document, visual: torch.Tensor
) -> torch.Tensor:
    """Logits [L, vocabulary] of one document; ``visual`` [V, hidden] are its projected frames in order."""
    ids = torch.from_numpy(document.token_ids)
    table = weights["llm.embedding.word_embeddings.weight"]
    x = table[ids.clamp(min=0)].clone()
    x[ids == MEDIA_TOKEN] = visual
    for layer in range(model.llm.num_layers):
        x = decoder_layer(x, weights, layer, model)
    x = rms_norm(x, weights["llm.decoder.final_layernorm.weight"], model.llm.norm_eps)
    output = table if model.llm.tie_embeddings else weights["llm.output_layer.weight"]
    return x @ output[: model.llm.vocab_size].T


def loss_sum(logits: torch.Tensor, document: Document) -> torch.Tensor:
    labels = torch.from_numpy(document.labels)
    chosen = labels != IGNORE
    return nn.functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum")

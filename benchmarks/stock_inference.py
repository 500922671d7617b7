"""Stock Transformers beside the engine: Qwen2 of the same shape with sdpa, for ``benchmarks.inference``."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_vila import accelerator
from megatron_vila.config.schema import Config
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.sizes import head_dim, linear_shapes

Done = Callable[[dict[str, Any]], None]
"""Gets each row of the table."""

WARM_UP = 8
"""Tokens that are decoded before the rate is taken: they compile, record the CUDA graph and warm up."""


def stock(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    model = _stock_model(config, config.model.llm.num_layers)
    for tokens in lengths:
        step = options.chunk or tokens
        ids_1S = torch.randint(config.model.llm.vocab_size, (1, tokens), device=accelerator.device())
        try:
            with torch.no_grad():
                model(ids_1S[:, :1024], use_cache=True, logits_to_keep=1)
                accelerator.reset_peak_memory()
                started_s, cache = now(), None
                for first in range(0, tokens, step):
                    out = model(
                        ids_1S[:, first : first + step], past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                    cache = out.past_key_values
                prefill_s = now() - started_s
                times = []
                for _ in range(WARM_UP):
                    begun_s = now()
                    token_11 = out.logits[:, -1:].argmax(-1)
                    out = model(token_11, past_key_values=cache, use_cache=True)
                    times.append(now() - begun_s)
        except torch.OutOfMemoryError as error:
            print(f"{tokens} tokens do not fit: {str(error).splitlines()[0][:200]}", flush=True)
            cache = out = None
            free()
            continue
        done(
            {
                "engine": "transformers",
                "tokens": tokens,
                "cache": "bf16",
                "note": f"chunks of {step} tokens" if options.chunk else "one forward call",
                **rates(config, tokens, prefill_s),
                "decode_tokens_per_s": round(1 / statistics.median(times[2:]), 1),
                "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            }
        )
        del cache, out
        free()


def stock_longest(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    """The first of ``lengths`` whose last layer runs, in one forward call or (``--chunk``) as the last chunk of a filled cache.

    Memory is held for the weights of the layers before and for their keys and values, which a whole run would hold by then.
    """
    from transformers import DynamicCache

    llm, device = config.model.llm, accelerator.device()
    model = _stock_model(config, 1)
    layer_bytes = 2 * sum(weight.numel() for weight in model.model.layers.parameters())
    token_bytes = 2 * 2 * llm.num_kv_heads * head_dim(llm)
    for tokens in lengths:
        step = options.chunk or tokens
        accelerator.reset_peak_memory()
        held = cache = out = kv = None
        try:
            others = (llm.num_layers - 1) * (layer_bytes + tokens * token_bytes)
            held = [torch.empty(others, dtype=torch.uint8, device=device)]
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                if step < tokens:
                    kv = torch.randn(1, llm.num_kv_heads, tokens - step, head_dim(llm), device=device, dtype=model.dtype)
                    cache.update(kv, kv, 0)
                    kv = None
                ids_1S = torch.randint(llm.vocab_size, (1, step), device=device)
                started_s = now()
                out = model(ids_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
                model(out.logits.argmax(-1), past_key_values=cache, use_cache=True)
                seconds = now() - started_s
        except torch.OutOfMemoryError as error:
            print(f"{tokens} tokens do not fit: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            how = f"chunks of {step} tokens, the last one" if options.chunk else "one forward call"
            done(
                {
                    "engine": "transformers",
                    "tokens": tokens,
                    "cache": "bf16",
                    "note": f"{how}: last layer run in {seconds:.1f} s, memory of the others held",
                    "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
                }
            )
            break
        del held, cache, out, kv
        free()


def _stock_model(config: Config, layers: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    llm = config.model.llm
    torch.set_default_dtype(torch.bfloat16)
    with accelerator.device():
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=llm.vocab_size,
                hidden_size=llm.hidden_size,
                intermediate_size=llm.ffn_hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=llm.num_heads,
                num_key_value_heads=llm.num_kv_heads,
                max_position_embeddings=2**22,
                attn_implementation="sdpa",
            )
        ).eval()
    torch.set_default_dtype(torch.float32)
    return model


def rates(config: Config, tokens: int, seconds: float) -> dict[str, float]:
    """Floating point operations of the layers; attention as half of a square."""
    llm = config.model.llm
    weights = llm.num_layers * sum(outputs * inputs for outputs, inputs in linear_shapes(llm).values())
    flops = 2 * tokens * weights + 2 * tokens**2 * llm.num_heads * head_dim(llm) * llm.num_layers
    return {"prefill_s": round(seconds, 3), "prefill_tflops_per_gpu": round(flops / seconds / 1e12, 1)}


def now() -> float:
    accelerator.synchronize()
    return time.perf_counter()


def free() -> None:
    accelerator.collect_garbage()

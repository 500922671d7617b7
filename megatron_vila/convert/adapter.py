"""The LoRA of a checkpoint as a PEFT adapter of the plain causal language model (the ``llm`` folder).

Our fused layers share one input factor; PEFT has a pair for each projection, so each gets the shared one and its own rows of
the other. Legend: R rows of a projection, I inputs, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.tensor_files import MemoryTensor, write_tensors

_PREFIX = "base_model.model."


def adapter_problems(model: StoredModel) -> list[str]:
    """Why the checkpoint cannot be written as an adapter."""
    if not any(True for _ in model.low_rank()):
        return [f"{model.folder} holds no LoRA; leave out --adapter"]
    if "embeddings" in model.config.model.lora.also_train and model.config.model.llm.tie_embeddings:
        return ["the embedding table was trained and is tied, which PEFT would untie; export without --adapter"]
    return []


def write_adapter(folder: Path, model: StoredModel, dtype: torch.dtype | None) -> None:
    """``adapter_model.safetensors`` and, last, ``adapter_config.json``; ``dtype`` None keeps the stored one.

    Weights that were trained whole beside the LoRA (``lora.also_train``) go into PEFT's ``modules_to_save``.
    """
    tensors: dict[str, MemoryTensor] = {}
    targets = set()
    for factors in model.low_rank():
        rows = model.split_rows(factors.entry, factors.b_Rr)
        for name, b_Rr in zip(factors.entry.tensors, rows, strict=True):
            module = name.removeprefix("llm.").removesuffix(".weight")
            targets.add(module.rpartition(".")[2])
            for factor, tensor in (("lora_A", factors.a_rI), ("lora_B", b_Rr)):
                kept = tensor if dtype is None else tensor.to(dtype)
                tensors[f"{_PREFIX}{module}.{factor}.weight"] = MemoryTensor.of(kept.contiguous())
    lora = model.config.model.lora
    saved = {name for name in model.infos if _trained_whole(name, lora.also_train)}
    for name in saved:
        whole = model.read(name)
        kept = whole if dtype is None else whole.to(dtype)
        tensors[f"{_PREFIX}{name.removeprefix('llm.')}"] = MemoryTensor.of(kept.contiguous())
    write_tensors(folder, "adapter_model", tensors, lambda name: tensors[name].read())
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sorted({name.split(".")[-2] for name in saved}) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _trained_whole(name: str, also_train: Sequence[str]) -> bool:
    if not name.startswith("llm."):
        return False
    if name == "llm.model.embed_tokens.weight":
        return "embeddings" in also_train
    return "norms" in also_train and name.endswith("norm.weight")

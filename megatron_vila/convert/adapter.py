"""Writes the LoRA of a checkpoint as a PEFT adapter of the plain causal language model (the ``llm`` folder of an export).

Our fused layers (query, key and value; gate and up) have one pair of LoRA factors. PEFT has a pair for each projection, so
each projection gets the whole factor A, which reads the inputs, and its own rows of factor B.

Legend: R rows of a projection, I inputs, r rank of the LoRA.
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
    """Why ``model`` cannot be written as an adapter, each reason with its cure; empty if it can."""
    if not any(True for _ in model.low_rank()):
        return [f"{model.folder} holds no LoRA; leave out --adapter"]
    if "embeddings" in model.config.model.lora.also_train and model.config.model.llm.tie_embeddings:
        return [
            "the embedding table was trained (model.lora.also_train) and is tied to the output layer "
            "(model.llm.tie_embeddings=true), which PEFT would untie; export without --adapter"
        ]
    return []


def write_adapter(folder: Path, model: StoredModel, dtype: torch.dtype | None) -> None:
    """Write ``adapter_model.safetensors`` and then ``adapter_config.json`` into ``folder``.

    ``dtype`` is the dtype of the written tensors; None keeps the stored ones. Weights that were trained in full beside the LoRA
    (``model.lora.also_train``) go into PEFT's ``modules_to_save``. Raises ``ConversionError`` if the checkpoint cannot be read
    and ``OSError`` if writing fails.
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

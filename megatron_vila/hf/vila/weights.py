"""Reads the weights in a model's folder of either layout, after a check that they are those of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_vila.config.schema import ModelConfig
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_folder import misfits, open_folder

_OUTPUT_LAYER = "llm.lm_head.weight"


def read_weights(path: Path, model: ModelConfig, output_layer: bool) -> dict[str, torch.Tensor]:
    """The tensors in the folder ``path`` by their flat names, mapped from their safetensors files.

    Without ``output_layer``, as in a ``VILAModel``, it is left out, and may be missing.

    Before any tensor is read, raises ``ConversionError`` that lists everything that does not fit ``model``: missing, extra and
    wrongly shaped tensors, damaged and truncated files, pickled weights.
    """
    problems: list[str] = []
    folder = open_folder(path, None, problems)
    tensors = folder.tensors
    if not output_layer:
        tensors = {name: tensor for name, tensor in tensors.items() if name != _OUTPUT_LAYER}
        model = replace(model, llm=replace(model.llm, tie_embeddings=True))
    if not problems:
        problems += misfits(folder, tensors, model)
    if problems:
        raise ConversionError(f"the weights in {path} cannot be read", problems)
    return {name: tensor.read() for name, tensor in tensors.items()}

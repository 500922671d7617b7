"""Reads the weights in a model's folder of either layout, after a check that they are those of the model."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_vila.config.schema import ModelConfig
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_folder import misfits, open_folder


def read_weights(path: Path, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors in the folder ``path`` by their flat names, mapped from their safetensors files.

    Before any tensor is read, raises ``ConversionError`` that lists everything that does not fit ``model``: missing, extra and
    wrongly shaped tensors, damaged and truncated files, pickled weights.
    """
    problems: list[str] = []
    folder = open_folder(path, None, problems)
    if not problems:
        problems += misfits(folder, folder.tensors, model)
    if problems:
        raise ConversionError(f"the weights in {path} cannot be read", problems)
    return {name: tensor.read() for name, tensor in folder.tensors.items()}

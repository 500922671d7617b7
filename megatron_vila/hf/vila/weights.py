"""Weights of a model's folder, of either layout, checked against what the model wants before any tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_folder import open_folder


def read_weights(folder: Path, expected: Mapping[str, torch.Size], shared: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of ``folder`` by their flat names, mapped from their safetensors files.

    ``expected`` are the names and shapes of the model's tensors; those in ``shared`` are other names of the same memory and
    may be left out. Raises ``ConversionError`` that lists everything that is wrong: missing, extra and wrongly shaped tensors,
    damaged and truncated files, pickled weights.
    """
    problems: list[str] = []
    stored = open_folder(folder, None, problems).tensors
    if problems:
        raise ConversionError(f"the weights in {folder} cannot be read", problems)
    problems += [
        f"missing: {name} {list(expected[name])}" for name in sorted(expected.keys() - stored.keys() - set(shared))
    ]
    problems += [
        f"extra: {name} {list(stored[name].shape)} in {stored[name].file}"
        for name in sorted(stored.keys() - expected.keys())
    ]
    problems += [
        f"wrong shape: {name} is {list(stored[name].shape)} in {stored[name].file}, wanted {list(expected[name])}"
        for name in sorted(stored.keys() & expected.keys())
        if stored[name].shape != tuple(expected[name])
    ]
    if problems:
        raise ConversionError(f"the weights in {folder} do not fit its config.json", problems)
    return {name: tensor.read() for name, tensor in stored.items()}

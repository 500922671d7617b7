"""Reads a distributed checkpoint of any parallel layout as Hugging Face tensors with flat names, one at a time, in one process.

The checkpoint's info.json holds the run's configuration and the Hugging Face files that the weights once came with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vila.checkpoint.files import UNCHECKED, check_alone, is_summed
from megatron_vila.checkpoint.folder import resolve_checkpoint
from megatron_vila.checkpoint.tensors import StoredTensors
from megatron_vila.config.load import config_from_dict
from megatron_vila.config.schema import Config
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.tensor_files import TensorInfo
from megatron_vila.convert.weight_map import Entry, entries
from megatron_vila.errors import CheckpointError, ConfigError
from megatron_vila.models.decoder.lora import FACTORS
from megatron_vila.plan.validate import value_problems

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank:
    """The two factors of one entry's LoRA update, alpha / rank * B A (R rows, I inputs, r rank); they do not hold the scale."""

    entry: Entry
    a_rI: torch.Tensor
    b_Rr: torch.Tensor


class StoredModel:
    """The model of a checkpoint. ``infos`` has dtype and shape of every tensor by flat Hugging Face name, ``read`` returns it.

    LoRA updates are merged in, unless ``merge`` is false. With ``main`` the float32 copies that Adam updates are read where
    the checkpoint has them. Raises ``ConversionError`` if a file is missing or damaged, and one that lists every tensor that is
    missing from the checkpoint, superfluous or of another shape.
    """

    def __init__(self, path: Path, merge: bool = True, main: bool = False) -> None:
        try:
            self.folder = resolve_checkpoint(path)
            info = check_alone(self.folder)
            self._stored = StoredTensors(self.folder, info["files"])
        except (CheckpointError, OSError) as error:
            raise ConversionError(f"{path} cannot be read", [str(error)]) from error
        if not is_summed(info):
            logger.warning(UNCHECKED, self.folder)
        self.config = config_of(info, self.folder)
        self.step: int = info["step"]
        self.hugging_face = _hugging_face_of(info, self.folder)
        self._main = main
        lora = self.config.model.lora
        self._scale = lora.alpha / lora.rank if merge and lora.rank else 0.0
        self.entries = entries(self.config.model)
        self._check()
        self._entry_of = {name: entry for entry in self.entries for name in entry.tensors}
        self._last: tuple[Entry | None, list[torch.Tensor]] = (None, [])
        self.infos = {
            name: TensorInfo(self._stored[self._key(entry.key)].dtype, shape)
            for entry in self.entries
            for name, shape in entry.tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name``. Tensors that are stored together are read once if they are asked for one after another.

        Raises ``ConversionError`` if it cannot be read.
        """
        entry = self._entry_of[name]
        if self._last[0] is not entry:
            self._last = (entry, self.split_rows(entry, self._merged(entry)))
        return self._last[1][list(entry.tensors).index(name)]

    def low_rank(self) -> Iterable[LowRank]:
        """The LoRA factors of every entry that has them."""
        for entry in self.entries:
            factors = self._factors(entry)
            if factors is not None:
                yield factors

    def split_rows(self, entry: Entry, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split ``tensor``, which has the rows of ``entry``, into a tensor for each Hugging Face tensor of the entry."""
        rows = [shape[0] for shape in entry.tensors.values()]
        return entry.how.split(tensor, rows, self.config.model.llm.num_kv_heads)

    def _merged(self, entry: Entry) -> torch.Tensor:
        weight_RI = self._tensor(entry.key, entry.layer)
        factors = self._factors(entry) if self._scale else None
        if factors is None:
            return weight_RI
        exact = torch.promote_types(weight_RI.dtype, torch.float32)
        update_RI = factors.b_Rr.to(exact) @ factors.a_rI.to(exact)
        return weight_RI.to(exact).add_(update_RI, alpha=self._scale).to(weight_RI.dtype)

    def _factors(self, entry: Entry) -> LowRank | None:
        linear, _, leaf = entry.key.rpartition(".")
        a, b = f"{linear}.{FACTORS[0]}", f"{linear}.{FACTORS[1]}"
        if leaf != "weight" or a not in self._stored:
            return None
        return LowRank(entry, *(self._tensor(key, entry.layer) for key in (a, b)))

    def _tensor(self, key: str, layer: int | None) -> torch.Tensor:
        try:
            return self._stored.read(self._key(key), layer)
        except CheckpointError as error:
            raise ConversionError(f"{self.folder} cannot be read", [str(error)]) from error

    def _key(self, key: str) -> str:
        main = f"optimizer.main.{key}"
        return main if self._main and main in self._stored else key

    def _check(self) -> None:
        wanted = {entry.key: entry for entry in self.entries}
        stored = {key: info.shape for key, info in self._stored.items() if not key.startswith("optimizer.")}
        problems = misfits(self.entries, stored)
        linears = {key.rpartition(".")[0] for key in wanted}
        for key in sorted(stored.keys() - wanted.keys()):
            linear, _, leaf = key.rpartition(".")
            if not (leaf in FACTORS and linear in linears):
                problems.append(f"{key} {list(stored[key])} belongs to no part of the model that its info.json describes")
        if problems:
            raise ConversionError(f"{self.folder} does not fit its configuration", problems)


_HUGGING_FACE = ("root", "llm", "vision", "generation", "preprocessor")


def misfits(entries: Iterable[Entry], stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which of ``entries`` a checkpoint with the shapes ``stored`` lacks or has in another shape, a message each."""
    problems = []
    for key, entry in {entry.key: entry for entry in entries}.items():
        if key not in stored:
            problems.append(
                f"{key} is missing; it should be {list(entry.stored_shape)} and become {', '.join(entry.tensors)}"
            )
        elif not _fits(stored[key], entry):
            problems.append(f"{key} is {list(stored[key])}; it should be {list(entry.stored_shape)}")
    return problems


def _fits(shape: tuple[int, ...], entry: Entry) -> bool:
    """Whether the stored shape fits. A table may have more padding rows, for a tp that does not divide the usual multiple."""
    if entry.how.pads and shape[1:] == entry.stored_shape[1:]:
        return shape[0] >= next(iter(entry.tensors.values()))[0]
    return shape == entry.stored_shape


def config_of(info: Mapping[str, Any], folder: Path) -> Config:
    """The configuration in the info.json of the checkpoint ``folder``. Raises ``ConversionError`` if its model cannot be used."""
    if "config" not in info:
        raise ConversionError(
            f"{folder} cannot be read",
            [
                "its info.json holds no configuration, because an older version wrote it; continue the run for a step and "
                "convert the checkpoint that it saves"
            ],
        )
    try:
        if not isinstance(info["config"], dict):
            raise ConfigError(f"{folder / 'info.json'}: config is not a group of settings")
        config = config_from_dict(info["config"], str(folder / "info.json"))
        problems = [problem for problem in value_problems(config) if problem.startswith("model.")]
    except ConfigError as error:
        problems = str(error).splitlines()
    if problems:
        raise ConversionError(
            f"{folder} cannot be read", [f"the run has no usable configuration: {problem}" for problem in problems]
        )
    return config


def _hugging_face_of(info: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The JSON files of the Hugging Face folder from which the weights were imported, by kind; {} if there was none."""
    files = info.get("hugging_face") or {}
    if not isinstance(files, dict) or not all(isinstance(files.get(kind) or {}, dict) for kind in _HUGGING_FACE):
        raise ConversionError(f"{folder} cannot be read", ["hugging_face in its info.json holds no JSON objects"])
    return files

"""Checks whether the files of a checkpoint are undamaged, and whether two models are equal.

The models may be Hugging Face folders of any layout, distributed checkpoints of any parallel layout, or one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_vila.checkpoint import files
from megatron_vila.checkpoint.folder import resolve_checkpoint
from megatron_vila.checkpoint.tensors import StoredTensors
from megatron_vila.config.keys import config_keys
from megatron_vila.config.schema import Config, ModelConfig
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.hf_config import describe_model
from megatron_vila.convert.hf_folder import open_folder
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.convert.tensor_files import TensorInfo
from megatron_vila.convert.weight_map import shapes
from megatron_vila.errors import CheckpointError, some
from megatron_vila.plan.bounds import value_of

SHOWN = 20
"""How many differences a report prints."""

_BLOCK = 1 << 24  # elements that are compared at a time
# Parts of keys that say how a run computes, not what the model is.
_SETTINGS_OF_RUNS = ("model.name", "frame_micro_batch", "recompute", "model.init_std", "model.attention", "model.lora")


@dataclass(frozen=True)
class Side:
    """One of the two models: dtype and shape of its tensors by flat Hugging Face name, and how to read one."""

    path: Path
    model: ModelConfig
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]


@dataclass
class Report:
    """What was compared. ``equal`` means that both models have the same settings and the same tensors, byte by byte."""

    a: Path
    b: Path
    tensors: int = 0
    parameters: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return not self.differences

    def __str__(self) -> str:
        counted = f"{self.tensors} tensors, {self.parameters:,} parameters compared bit by bit"
        if self.equal:
            return f"equal: {self.a} and {self.b} ({counted}; model settings are equal)"
        shown = [f"- {text}" for text in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            shown.append(f"- and {len(self.differences) - SHOWN} more")
        return "\n".join([f"different: A={self.a}, B={self.b} ({counted})", *shown])


@dataclass(frozen=True)
class FileReport:
    """A check of one checkpoint's files. ``problems`` name what is damaged; ``checked`` says whether it has checksums."""

    folder: Path
    files: int
    size_bytes: int
    checked: bool
    problems: list[str]

    @property
    def whole(self) -> bool:
        """Whether no damage was found."""
        return not self.problems

    def __str__(self) -> str:
        counted = f"{self.files} files, {self.size_bytes / 1e9:.2f} GB"
        if not self.whole:
            return "\n".join([f"damaged: {self.folder} ({counted})", *(f"- {problem}" for problem in self.problems)])
        if not self.checked:
            return f"unchecked: {self.folder} ({counted}) is from a version without checksums; files and sizes are complete"
        return f"whole: {self.folder} ({counted}, every byte as it was written)"


def verify_files(path: str | Path) -> FileReport:
    """Check all files of a checkpoint (the folder of a step, or the newest one of a run) against what was written.

    Raises ``ConversionError`` if there is no checkpoint.
    """
    try:
        folder = resolve_checkpoint(Path(path))
    except (CheckpointError, OSError) as error:
        raise ConversionError(f"{path} cannot be verified", [str(error)]) from error
    problems: list[str] = []
    info: Mapping[str, Any] = {"files": {}}
    checks: tuple[Callable[[], Any], ...] = (
        lambda: files.check_files(folder, info),
        lambda: files.raise_damage(files.damage(folder, info, _blocks_of_whole_files(folder, info))),
        lambda: StoredTensors(folder, info["files"]),
        lambda: files.read_state(folder),
    )
    try:
        info = files.read_info(folder)
    except (CheckpointError, OSError) as error:
        problems, checks = [str(error)], ()
    for check in checks:
        try:
            check()
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    return FileReport(folder, len(info["files"]), sum(info["files"].values()), files.is_summed(info), problems)


def _blocks_of_whole_files(folder: Path, info: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The blocks to check of files with the right size. Missing and truncated files are reported by another check."""
    if not files.is_summed(info):
        return []
    wrong = set(files.wrong_files(folder, info))
    return [(name, block) for name, block in files.blocks_to_check(info) if name not in wrong]


def verify(a: str | Path, b: str | Path) -> Report:
    """Compare two models. One tensor of each is in memory at a time. Raises ``ConversionError`` if a model cannot be read."""
    one, other = _open(Path(a)), _open(Path(b))
    report = Report(one.path, other.path)
    report.differences += _setting_differences(one.model, other.model)
    for name, side in (("A", one), ("B", other)):
        only = sorted(side.infos.keys() - (other if side is one else one).infos.keys())
        if only:
            report.differences.append(f"only in {name}, {len(only)} in number: {some(only)}")
    # In the order of the weight map, tensors that a checkpoint stores together follow each other and are read once.
    for name in dict.fromkeys([*shapes(one.model), *one.infos]):
        if name in one.infos and name in other.infos:
            report.tensors += 1
            report.parameters += torch.Size(one.infos[name].shape).numel()
            report.differences += _tensor_differences(name, one, other)
    return report


def _open(path: Path) -> Side:
    if (path / "info.json").is_file() or (path / "checkpoints").is_dir():
        stored = StoredModel(path)
        return Side(path, stored.config.model, stored.infos, stored.read)
    problems: list[str] = []
    folder = open_folder(path, None, problems)
    description = describe_model(folder.sections, problems, has_head=folder.has_head)
    if problems:
        raise ConversionError(f"{path} cannot be compared", problems)
    tensors = dict(folder.tensors)
    return Side(path, description.model, tensors, lambda name: tensors[name].read())


def _setting_differences(a: ModelConfig, b: ModelConfig) -> Iterable[str]:
    names = (key.name for key in config_keys() if key.name.startswith("model."))
    for name in names:
        in_a, in_b = (value_of(Config(model=model), name) for model in (a, b))
        if in_a != in_b and not any(part in name for part in _SETTINGS_OF_RUNS):
            yield f"{name}: {in_a} in A, {in_b} in B"


def _tensor_differences(name: str, a: Side, b: Side) -> Iterable[str]:
    info_a, info_b = a.infos[name], b.infos[name]
    if info_a.shape != info_b.shape:
        yield f"{name}: shape {list(info_a.shape)} in A, {list(info_b.shape)} in B"
        return
    x, y = a.read(name).flatten(), b.read(name).flatten()
    same_dtype = x.dtype == y.dtype
    if same_dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)):
        return
    count, largest = 0, 0.0
    for x_block, y_block in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
        apart = (x_block.double() - y_block.double()).abs()
        count += int((x_block != y_block).sum())
        largest = max(largest, float(apart.max()) if len(apart) else 0.0)
    kinds = "" if same_dtype else f"{x.dtype} in A, {y.dtype} in B; ".replace("torch.", "")
    yield f"{name}: {kinds}{count} of {len(x)} elements differ, by up to {largest:.3g}"

"""Files of a checkpoint: agreement of all ranks, safe reading, and Megatron-Core's torch_dist format without helper processes."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_vila.errors import UserError
from megatron_vila.models.lora import FACTORS

FORMAT = 1
SHOWN = 8
T = TypeVar("T")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved or loaded; the text says why, what is intact and what to do. Raised on every rank."""


def on_all_ranks(action: Callable[[], T], failed: str, cure: str = "") -> T:
    """Run ``action`` on every rank; if it raises on any, raise ``CheckpointError`` with that reason on all of them.

    Collective over all ranks, after the action.
    """
    result, problem = None, None
    try:
        result = action()
    except (Exception, dcp.CheckpointException) as error:  # torch's is no Exception
        problem = _text(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    bad = [rank for rank, text in enumerate(problems) if text is not None]
    if bad:
        where = "" if len(bad) == len(problems) else f" (rank {', '.join(map(str, bad[:SHOWN]))})"
        raise CheckpointError(f"{failed}{where}: {problems[bad[0]]}" + (f"; {cure}" if cure else ""))
    return result


def on_rank_zero(action: Callable[[], T], failed: str, cure: str = "") -> T:
    """Run ``action`` on rank 0; its result, or ``CheckpointError`` with what went wrong, on every rank (one broadcast)."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = _text(error)
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome
    if problem is not None:
        raise CheckpointError(f"{failed}: {problem}" + (f"; {cure}" if cure else ""))
    return result


class InProcessSave(torch_dist.TorchDistSaveShardedStrategy):
    """Writes torch_dist files from this process.

    Megatron's own writer starts a manager and forks writers even for a synchronous save: that needs a guarded main module,
    takes seconds, is unsafe with decoder threads, and leaves the manager behind when the rank is killed.
    """

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        entries, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, keep_only_main_replica=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            dcp.save(
                torch_dist.mcore_to_pyt_state_dict(entries, is_loading=False),
                storage_writer=dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
                planner=torch_dist.MCoreSavePlanner(flatten_state_dict=False),
            )


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``dist_checkpointing.load`` of ``state``; collective over all ranks with Megatron-Core 0.16.1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return dist_checkpointing.load(state, str(folder), validate_access_integrity=False)


def describe(step: int, info: dict[str, Any], sizes: dict[str, int], world_size: int) -> dict[str, Any]:
    """The content of ``info.json``."""
    return {
        "format": FORMAT,
        "step": step,
        **info,
        "world_size": world_size,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("megatron-vila", "megatron-core", "torch")},
        "files": sizes,
    }


def check_files(folder: Path) -> None:
    """Raise ``CheckpointError`` unless every file of ``info.json`` is there with its size."""
    info = json.loads((folder / "info.json").read_text())
    if info["format"] > FORMAT:
        raise CheckpointError(
            f"it has format {info['format']}, this version reads up to {FORMAT}; update megatron_vila"
        )
    wrong = [name for name, size in info["files"].items() if not _has_size(folder / name, size)]
    if wrong:
        raise CheckpointError(f"missing or truncated files: {_some(wrong)}; restore them or load another checkpoint")


def read_stored_tensors(folder: Path) -> dict[str, Any]:
    """Name -> torch metadata (``size``) of the tensors in a checkpoint; raises as ``read_metadata``."""
    return read_metadata(folder).state_dict_metadata


def read_metadata(folder: Path) -> Any:
    """torch's ``Metadata`` of a checkpoint: the tensors and where their pieces lie.

    torch and Megatron-Core unpickle the same file without restriction: it is read here first, with nothing but the plain
    metadata classes allowed. Raises ``CheckpointError`` for anything else in it.
    """
    with open(folder / ".metadata", "rb") as file:
        return _MetadataUnpickler(file).load()


def compare(wanted: Iterable[ShardedTensor], stored: dict[str, Any]) -> None:
    """Raise ``CheckpointError`` naming the tensors that a checkpoint does not have, or has in another shape, and the LoRA factors
    that would be lost."""
    missing, different, known = set(), set(), set()
    for tensor in wanted:
        known.add(tensor.key)
        if tensor.key not in stored:
            missing.add(tensor.key)
        elif not tensor.allow_shape_mismatch and tuple(stored[tensor.key].size) != tuple(tensor.global_shape):
            different.add(f"{tensor.key} {list(stored[tensor.key].size)} instead of {list(tensor.global_shape)}")
    problems = []
    lost = [key for key in stored.keys() - known if key.endswith(FACTORS) and not key.startswith("optimizer.")]
    if lost:
        problems.append(f"{len(lost)} LoRA tensors that the model has no place for: {_some(sorted(lost))}")
    if different:
        problems.append(f"{len(different)} tensors of another shape: {_some(sorted(different))}")
    if missing:
        problems.append(f"{len(missing)} tensors missing: {_some(sorted(missing))}")
    if problems:
        cure = "load it with the model configuration that it was saved with"
        if lost and not different and not missing:
            cure = "set model.lora as in the run that saved them, or merge them (tools/convert_checkpoint.py export, then import)"
        elif not different and all(key.startswith("optimizer.") for key in missing):
            cure = "parts that were frozen then have no optimizer state; start a new run from the weights with checkpoint.load"
        raise CheckpointError(f"{'; '.join(problems)}; {cure}")


def require_plain(value: Any, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is made of dicts, lists, tuples, strings, numbers, None and tensors only."""
    if isinstance(value, dict):
        for key, item in value.items():
            require_plain(key, f"a key of {name}")
            require_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            require_plain(item, f"{name}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None), torch.Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; a checkpoint holds plain dicts, lists, strings, numbers and tensors"
        )


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _MetadataUnpickler(pickle.Unpickler):
    _DCP = "torch.distributed.checkpoint."
    _ALLOWED = {
        (_DCP + "metadata", "Metadata"),
        (_DCP + "metadata", "TensorStorageMetadata"),
        (_DCP + "metadata", "BytesStorageMetadata"),
        (_DCP + "metadata", "ChunkStorageMetadata"),
        (_DCP + "metadata", "TensorProperties"),
        (_DCP + "metadata", "MetadataIndex"),
        (_DCP + "metadata", "StorageMeta"),
        (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
        (_DCP + "filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise CheckpointError(f".metadata refers to {module}.{name}, which no checkpoint of ours holds; it was not run")


def _member(kind: Any, name: Any) -> Any:
    """What stands in for ``getattr``, by which early releases of Python 3.11 pickle the members of an enumeration."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise CheckpointError(f".metadata takes {name} of {kind}, which no checkpoint of ours does; it was not run")
    return kind[name]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _text(error: BaseException) -> str:
    """The message of our own errors; else kind and message of the innermost one, for torch wraps what a rank raised."""
    if isinstance(error, CheckpointError):
        return str(error)
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

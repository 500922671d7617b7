"""Distributed checkpoints that survive a crash at any moment and load under any layout.

A run's folder holds::

    checkpoints/step-00000100/    one checkpoint: Megatron-Core's torch_dist files, state.pt, info.json (the last one written)
    checkpoints/latest            the name of the newest finished one
    checkpoints/.step-...         being written or deleted; ignored by loading, removed by the next save

A checkpoint is written under a hidden name, its files are flushed to disk, then it is renamed, then ``latest`` is replaced.
Weights and Adam's state are stored by global name and place, so (tp, pp, ulysses, ring, dp) may differ when it is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vila.models.lora import FACTORS
from megatron_vila.training import checkpoint_io as io
from megatron_vila.training.checkpoint_io import CheckpointError
from megatron_vila.training.offload import reload_main_weights
from megatron_vila.training.optimizer_shards import ensure_state, get_step, set_step, state_shards

__all__ = [
    "CheckpointError",
    "latest_checkpoint",
    "load_checkpoint",
    "read_info",
    "resolve_checkpoint",
    "save_checkpoint",
]


def save_checkpoint(
    run_folder: str | Path,
    step: int,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: DistributedOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    extra: dict[str, Any] | None = None,
    keep: int = 0,
    info: dict[str, Any] | None = None,
) -> Path:
    """Save after ``step`` steps; returns the checkpoint's folder. Collective over all ranks, which share the file system.

    ``extra`` (dicts, lists, strings, numbers, tensors) comes back from ``load_checkpoint``; ``info`` (JSON values: the
    model's name, the layout, the configuration) goes into info.json; both are rank 0's. ``keep`` newest checkpoints up to this
    step stay, 0 keeps all. Without ``optimizer`` only weights are saved. Raises ``TypeError`` for other types in ``extra``
    and, on every rank, ``CheckpointError`` if writing fails; earlier checkpoints are intact then.
    """
    io.require_plain(extra or {}, "extra")
    root = Path(run_folder) / "checkpoints"
    partial = root / f".step-{step:08d}.partial"
    failed = f"checkpoint of step {step} not saved in {root}"
    cure = "earlier checkpoints are intact; free space or set train.output to a folder that can be written"

    final = io.on_rank_zero(lambda: _make_room(root, partial, step), failed, cure)
    model_state = _model_state(model_chunks)
    state: dict[str, Any] = {"model": model_state}
    counters: dict[str, Any] = {"adam_step": None, "scheduler_steps": None}
    if optimizer is not None:
        ensure_state(optimizer)
        counters["adam_step"] = get_step(optimizer)
        state["optimizer"] = state_shards(optimizer, model_state)
    if scheduler is not None:
        counters["scheduler_steps"] = scheduler.num_steps
    writer = io.InProcessSave("torch_dist", 1)
    if isinstance(model_chunks[0], DistributedDataParallel):
        # Replicas share the writing of the weights; of Adam's state each has its own part anyway.
        writer = FullyParallelSaveStrategyWrapper(writer, model_chunks[0].dp_cp_group)

    def write_tensors() -> None:
        dist_checkpointing.save(state, str(partial), sharded_strategy=writer, validate_access_integrity=False)

    def finish() -> None:
        torch.save({**counters, "extra": extra or {}}, partial / "state.pt")
        if not (partial / "common.pt").exists():
            # Megatron-Core 0.16.1 wants this file; 0.19.2 no longer writes it.
            torch.save({}, partial / "common.pt")
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        described = io.describe(step, info or {}, sizes, dist.get_world_size())
        (partial / "info.json").write_text(json.dumps(described, indent=2) + "\n")
        _publish(root, partial, final)
        _delete_older(root, final, keep)

    io.on_all_ranks(write_tensors, failed, cure)
    io.on_rank_zero(finish, failed, cure)
    return final


def load_checkpoint(
    path: str | Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: DistributedOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> dict[str, Any]:
    """Load a checkpoint's folder, or the newest one of a run's folder, into the model and what else is given.

    Returns ``extra`` of the save. Without ``optimizer`` only weights are loaded: do it before ``build_optimizer``, which
    copies 16-bit weights. Collective over all ranks. Raises ``CheckpointError`` on every rank if there is no finished
    checkpoint, a file is missing or damaged, or tensors are missing or differ in shape (they are named). LoRA factors that a
    checkpoint without them lacks keep their initial values; those that the model has no place for are an error.
    """
    # Rank 0 alone looks: a network file system may show ranks different moments of a folder.
    folder = io.on_rank_zero(lambda: resolve_checkpoint(Path(path)), f"nothing to load at {path}")
    failed = f"cannot load checkpoint {folder}"
    io.on_all_ranks(lambda: io.check_files(folder), failed)
    stored = io.on_all_ranks(lambda: io.read_stored_tensors(folder), failed)
    saved = io.on_all_ranks(lambda: torch.load(folder / "state.pt", weights_only=True, map_location="cpu"), failed)
    if optimizer is not None and saved["adam_step"] is None:
        raise CheckpointError(f"{failed}: it holds weights only; start a new run from it with checkpoint.load={folder}")

    model_state = _model_state(model_chunks)
    if optimizer is None:
        _leave_out_new_updates(model_state, stored)
    state: dict[str, Any] = {"model": model_state}
    shards: dict[str, ShardedTensor] = {}
    # A float32 run has no main copies: its weights are what Adam updates.
    has_main = any(key.startswith("optimizer.main.") for key in stored)
    if optimizer is not None:
        ensure_state(optimizer)
        shards = state_shards(optimizer, model_state)
        if not has_main:
            shards = {name: shard for name, shard in shards.items() if not shard.key.startswith("optimizer.main.")}
        state["optimizer"] = shards
    io.on_all_ranks(lambda: io.compare(_tensors(state), stored), failed)

    targets = {name: shard.data for name, shard in shards.items()}
    loaded = io.on_all_ranks(lambda: io.load_sharded(state, folder), failed, "restore its files or load another one")
    for index, chunk in enumerate(model_chunks):
        _unwrap(chunk).load_state_dict(loaded["model"][str(index)], strict=False)
    if optimizer is not None:
        if not any(shard.key.startswith("optimizer.main.") for shard in shards.values()):
            reload_main_weights(optimizer)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(loaded["optimizer"][name].view_as(target))
        set_step(optimizer, saved["adam_step"])
    if scheduler is not None and saved["scheduler_steps"] is not None:
        # The schedule itself is the configuration's: only the place on it is loaded.
        scheduler.num_steps = saved["scheduler_steps"]
        scheduler.step(0)
    return saved["extra"]


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest finished checkpoint of a run's folder (the one that ``latest`` names, if it is there), or None."""
    root = Path(run_folder) / "checkpoints"
    finished = _finished(root)
    pointer = root / "latest"
    named = root / pointer.read_text().strip() if pointer.is_file() else None
    if named in finished:
        return named
    return finished[-1] if finished else None


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a finished checkpoint: ``path`` itself, or the newest of a run's folder. Raises ``CheckpointError``."""
    if (path / "info.json").is_file():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            "no finished checkpoint there; give the folder of a step (step-...) or the folder of a run"
        )
    return newest


def read_info(path: str | Path) -> dict[str, Any]:
    """info.json of a checkpoint's folder, or of the newest one of a run's folder. Raises ``CheckpointError``."""
    return json.loads((resolve_checkpoint(Path(path)) / "info.json").read_text())


def _order(folder: Path) -> tuple[int, int]:
    """(step, number of the save at that step) of ``step-00000010`` or, saved again, ``step-00000010-1``."""
    _, step, *again = folder.name.split("-")
    return int(step), int(again[0]) if again else 0


def _finished(root: Path) -> list[Path]:
    """Finished checkpoints, the oldest step first."""
    return sorted((folder for folder in root.glob("step-*") if (folder / "info.json").is_file()), key=_order)


def _make_room(root: Path, partial: Path, step: int) -> Path:
    """Make the folder to write into; returns the place where it will go."""
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".step-*"):
        shutil.rmtree(left_over)
    partial.mkdir()
    return _free_place(root, step)


def _free_place(root: Path, step: int) -> Path:
    """A checkpoint of the same step is not overwritten: there would be a moment without any."""
    saved = [_order(folder)[1] for folder in root.glob(f"step-{step:08d}*")]
    return root / (f"step-{step:08d}-{max(saved) + 1}" if saved else f"step-{step:08d}")


def _publish(root: Path, partial: Path, final: Path) -> None:
    """Make a complete hidden folder the newest checkpoint. A crash between any two lines leaves a loadable one."""
    for file in partial.iterdir():
        io.flush(file)
    io.flush(partial)
    partial.rename(final)
    io.flush(root)
    pointer = root / ".latest"
    pointer.write_text(final.name + "\n")
    io.flush(pointer)
    os.replace(pointer, root / "latest")
    io.flush(root)


def _delete_older(root: Path, final: Path, keep: int) -> None:
    """Later steps, left by a run that was set back by hand, are nobody's to delete."""
    older = [folder for folder in _finished(root) if _order(folder) < _order(final)]
    for folder in older:
        if _order(folder)[0] == _order(final)[0]:
            _delete(folder)
    if keep > 0:
        for folder in [folder for folder in older if folder.exists()][: 1 - keep or None]:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Hidden first, so that a half-deleted checkpoint is never taken for a finished one."""
    hidden = folder.with_name(f".{folder.name}.deleted")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def _model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The sharded state of the model: tensors only (Megatron's ``_extra_state`` objects are empty without its fp8)."""
    state = {str(index): _unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(model_chunks)}
    _, tensors = extract_matching_values(state, lambda entry: isinstance(entry, ShardedObject))
    return tensors


def _leave_out_new_updates(model_state: dict[str, Any], stored: dict[str, Any]) -> None:
    """Take out the LoRA factors of linear layers that have none in the checkpoint: an update that begins is no lost one."""
    for chunk in model_state.values():
        for name, entry in list(chunk.items()):
            linear, _, leaf = entry.key.rpartition(".")
            if leaf in FACTORS and not any(f"{linear}.{factor}" in stored for factor in FACTORS):
                del chunk[name]


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            yield from nested_values({"built": entry.build()})
        else:
            yield entry

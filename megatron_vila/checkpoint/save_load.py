"""Distributed checkpoints that survive a crash or a full disk at any moment and load under any layout.

A run's folder holds ``checkpoints/step-00000100/`` (``folder.py`` tells which names are ours), one checkpoint::

    __0_0.distcp, ...   the tensors that a rank wrote (tensors.py)
    .metadata           which pieces a tensor consists of
    state.pt            Adam's step count, place on the schedule, what the trainer counts
    info.json           step, layout, configuration, size and checksums of every file (files.py); the last one written

A checkpoint is written under a hidden name, its files are flushed to disk, then it is renamed, then ``latest`` is replaced.
Weights and Adam's state are stored by global name and place, so (tp, pp, ulysses, ring, dp) may differ when it is loaded.

Who writes what is agreed on first, from metadata alone. Then every rank writes, or reads, by itself, and all agree on the
outcome: a rank that fails leaves nobody waiting.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values, nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vila.checkpoint import files
from megatron_vila.checkpoint import folder as folders
from megatron_vila.checkpoint.fit import require_tensors, require_vocabulary
from megatron_vila.checkpoint.folder import latest_checkpoint, resolve_checkpoint
from megatron_vila.checkpoint.io import require_plain
from megatron_vila.checkpoint.optimizer_shards import (
    ensure_state,
    get_step,
    reload_main_weights,
    set_step,
    state_shards,
)
from megatron_vila.checkpoint.tensors import (
    METADATA,
    Piece,
    PieceWriter,
    StoredTensor,
    StoredTensors,
    Target,
    write_metadata,
)
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.models.decoder.lora import FACTORS
from megatron_vila.parallel.agreement import gathered, on_all_ranks, on_rank_zero
from megatron_vila.plan.budgets import GIB

logger = logging.getLogger(__name__)


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
    and, on every rank at once, ``CheckpointError`` if anything fails on any of them; earlier checkpoints are intact then.
    """
    require_plain(extra or {}, "extra")
    root = Path(run_folder) / "checkpoints"
    failed = f"checkpoint of step {step} not saved in {root}"
    try:
        partial, final = on_rank_zero(lambda: folders.make_room(root, step), failed)
        shards = on_all_ranks(lambda: _what_to_save(model_chunks, optimizer), failed)
        state: dict[str, Any] = {"adam_step": None, "scheduler_steps": None, "extra": extra or {}}
        if optimizer is not None:
            state["adam_step"] = get_step(optimizer)
        if scheduler is not None:
            state["scheduler_steps"] = scheduler.num_steps
        if isinstance(model_chunks[0], DistributedDataParallel):
            # Replicas share the writing of the weights; of Adam's state each has its own part anyway.
            _share_writing(shards, model_chunks[0].dp_cp_group)
        pieces, written = on_all_ranks(lambda: _write_own(partial, shards), failed)
        by_rank: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((pieces, written), by_rank)

        def finish() -> None:
            all_files = {name: file for _, of_rank in by_rank for name, file in of_rank.items()}
            all_files[METADATA] = write_metadata(partial, (piece for of_rank, _ in by_rank for piece in of_rank))
            files.write_rest(partial, step, state, info or {}, all_files, dist.get_world_size())
            folders.publish(partial, final)

        on_rank_zero(finish, failed)
    except CheckpointError as error:
        advice = on_rank_zero(lambda: _after_failure(Path(run_folder)), failed)
        raise error.worded(f"{error}; {advice}") from error.__cause__
    on_rank_zero(lambda: folders.delete_older(final, keep), failed)
    return final


def load_checkpoint(
    path: str | Path,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: DistributedOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint's folder, or the newest one of a run's folder, into the model and what else is given.

    Returns ``extra`` of the save. Without ``optimizer`` only weights are loaded: do it before ``build_optimizer``, which
    copies 16-bit weights. ``check=False`` if the content of its files was checked just now (``newest_whole``). Collective over
    all ranks. Raises ``CheckpointError`` on every rank if there is no finished checkpoint, a file is missing or damaged, or
    tensors are missing or differ in shape (they are named). LoRA factors that a checkpoint without them lacks keep their
    initial values; those that the model has no place for are an error.
    """
    # Rank 0 alone looks: a network file system may show ranks different moments of a folder.
    folder = on_rank_zero(lambda: resolve_checkpoint(Path(path)), f"nothing to load at {path}")
    failed = f"cannot load checkpoint {folder}"
    try:
        stored, saved, info = _open(folder, failed, check)
    except DamagedError as error:
        advice = on_rank_zero(lambda: _other_way(folder, optimizer is not None), failed)
        raise error.worded(f"{error}; {advice}") from error.__cause__
    if optimizer is not None and saved["adam_step"] is None:
        raise CheckpointError(f"{failed}: it holds weights only; start a new run from it with checkpoint.load={folder}")

    vocab_size = _unwrap(model_chunks[0]).vocab_size
    on_all_ranks(lambda: require_vocabulary(vocab_size, stored, info), failed)
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
    on_all_ranks(lambda: require_tensors(_tensors(state), stored), failed)

    targets = {name: shard.data for name, shard in shards.items()}
    loaded = on_all_ranks(lambda: _read(state, stored), failed)
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


def newest_whole(run_folder: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run whose files are all as they were written, and what is wrong with newer ones, by folder.

    None if the run has no checkpoint yet. Collective over all ranks, which share the reading. Raises ``CheckpointError`` if
    there are checkpoints and none is whole, or if one that may be whole cannot be read: by this version, or for now.
    """
    candidates = on_rank_zero(lambda: folders.to_resume(run_folder), f"cannot continue in train.output={run_folder}")
    passed_over: dict[Path, str] = {}
    for folder in candidates:
        try:
            _open(folder, folder.name, check=True)
        except DamagedError as error:
            passed_over[folder] = str(error)
        except CheckpointError as error:
            raise error.worded(undecided(folder, error)) from error.__cause__
        else:
            return folder, passed_over
    if passed_over:
        raise CheckpointError(
            f"no checkpoint of {run_folder} is whole: {'; '.join(passed_over.values())}; restore one from a copy, or start a new "
            "run in another train.output"
        )
    return None, {}


def undecided(folder: Path, error: Exception) -> str:
    """What ``checkpoint.resume=newest_whole`` ends with where ``error`` says nothing about the files of ``folder``."""
    return (
        f"checkpoint.resume=newest_whole cannot tell whether {folder} is whole: {error}; nothing was renamed: make it readable "
        "and start again, or move it to another folder to go on without it"
    )


def set_aside(damaged: Iterable[Path], whole: Path) -> list[Path]:
    """As ``folder.set_aside``, collective over all ranks. Raises ``CheckpointError``."""
    return on_rank_zero(
        lambda: folders.set_aside(damaged, whole), "damaged checkpoints cannot be renamed", "rename or delete them yourself"
    )


def read_info(path: str | Path) -> dict[str, Any]:
    """info.json of a checkpoint's folder, or of the newest one of a run's folder. Raises ``CheckpointError``."""
    return files.read_info(resolve_checkpoint(Path(path)))


# ---------------------------------------------------------------------------------------------------------------------
# saving


def _what_to_save(
    model_chunks: Sequence[torch.nn.Module], optimizer: DistributedOptimizer | None
) -> list[ShardedTensor]:
    """This rank's view of everything that is saved, before it is decided who writes what."""
    model_state = _model_state(model_chunks)
    state: dict[str, Any] = {"model": model_state}
    if optimizer is not None:
        ensure_state(optimizer)
        state["optimizer"] = state_shards(optimizer, model_state)
    sharded, _ = save_preprocess(state, validate_access_integrity=False)
    return list(nested_values(sharded))


def _share_writing(shards: list[ShardedTensor], group: dist.ProcessGroup) -> None:
    """Choose for each tensor that several ranks of ``group`` hold the one that writes it (an exchange of metadata)."""
    state = {"shards": shards}
    choice = determine_main_replica_uniform_distribution(state, group)
    distribute_main_replicas_with_precomputed_distribution(state, group, choice)


def _write_own(folder: Path, shards: Sequence[ShardedTensor]) -> tuple[list[Piece], dict[str, files.Written]]:
    """Write the tensors that are this rank's to write; no communication."""
    with PieceWriter(folder, dist.get_rank()) as writer:
        for shard in shards:
            if is_main_replica(shard.replica_id):
                data = shard.data.view((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
                writer.add(shard.key, data, shard.global_shape, shard.global_offset)
    return writer.pieces, writer.files


def _after_failure(run_folder: Path) -> str:
    """Remove what a failed save has written, so that it does not fill the disk, and tell what is intact and what to do."""
    root = run_folder / "checkpoints"
    newest, free = None, ""
    try:
        if root.is_dir():
            folders.clean(root)
            newest = latest_checkpoint(run_folder)
            free = f" ({shutil.disk_usage(root).free / GIB:.1f} GiB are free there)"
    except (CheckpointError, OSError) as error:
        return f"what is left there cannot be read ({error}); mend that and give the same command again"
    if newest is None:
        return (
            f"there is no earlier checkpoint; free space{free} or set train.output to a folder that can be written, and start "
            "again"
        )
    return (
        f"earlier checkpoints are intact; free space{free} or make the folder writable, and give the same command again: it "
        f"continues from {newest.name}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# loading


def _open(folder: Path, failed: str, check: bool) -> tuple[StoredTensors, dict[str, Any], dict[str, Any]]:
    """Tensors, state and info.json of a checkpoint, after a check of all its files whose reading the ranks share.

    Raises ``DamagedError`` if the files are not what was written, ``CheckpointError`` if that cannot be told.
    """
    info = on_rank_zero(lambda: files.checked_info(folder), failed)
    if check and files.is_summed(info):
        blocks = on_rank_zero(lambda: files.blocks_to_check(info), failed)[dist.get_rank() :: dist.get_world_size()]
        found = on_all_ranks(lambda: files.damage(folder, info, blocks), failed)
        everywhere = gathered(found)
        on_all_ranks(lambda: files.raise_damage(sum(everywhere, [])), failed)
    elif check and dist.get_rank() == 0:
        logger.warning(files.UNCHECKED, folder)
    return on_all_ranks(lambda: (StoredTensors(folder, info["files"]), files.read_state(folder), info), failed)


def _other_way(folder: Path, resuming: bool) -> str:
    """How to go on without a damaged checkpoint."""
    earlier: list[Path] = []
    with contextlib.suppress(OSError):  # what is wrong with this one must be told
        if folders.is_ours(folder):
            earlier = [other for other in folders.finished(folder.parent) if folders.order(other) < folders.order(folder)]
    if not earlier:
        return "restore its files from a copy, or load another checkpoint"
    if not resuming:
        return f"restore its files from a copy, or load the one before it: checkpoint.load={earlier[-1]}"
    return (
        f"restore its files from a copy, or continue from the newest whole checkpoint before it, with its optimizer state, by "
        f"checkpoint.resume=newest_whole (the next one is {earlier[-1].name})"
    )


def _read(state: dict[str, Any], stored: StoredTensors) -> dict[str, Any]:
    """Fill the tensors of ``state`` in place; returns it as plain tensors, those of factories put together again."""
    sharded, _, factories = load_preprocess(state)
    targets = []
    for shard in nested_values(sharded):
        shard.init_data("cpu", torch.zeros if shard.allow_shape_mismatch else torch.empty)
        data = shard.data.detach()
        if shard.allow_shape_mismatch:
            data.zero_()
        for _ in range(shard.prepend_axis_num):
            data = data.unsqueeze(0)
        targets.append(Target(shard.key, data, shard.global_offset, shard.allow_shape_mismatch))
    stored.read_into(targets)
    dict_list_map_inplace(lambda shard: shard.data.detach(), sharded)
    return apply_factory_merges(sharded, factories)


def _unwrap(chunk: torch.nn.Module) -> Any:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def _model_state(model_chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The sharded state of the model: tensors only (Megatron's ``_extra_state`` objects are empty without its fp8)."""
    state = {str(index): _unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(model_chunks)}
    _, tensors = extract_matching_values(state, lambda entry: isinstance(entry, ShardedObject))
    return tensors


def _leave_out_new_updates(model_state: dict[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Take out the LoRA factors of linear layers that have none in the checkpoint: an update that starts at zero has lost
    nothing."""
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

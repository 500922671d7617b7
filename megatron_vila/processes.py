"""The processes of a run: how they meet, what they share, how they part."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vila import accelerator
from megatron_vila.errors import LaunchError, PeerError, StallError, some

STARTED = "megatron_vila/started"
"""key under which each rank that has come to the start says which process it is (``this_process``)"""
_store: dist.Store | None = None
_before_end: list[Callable[[], None]] = []


def backend() -> str:
    """torch.distributed backend of this machine: ``nccl`` with CUDA, else ``gloo``."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def init_distributed(timeout_minutes: float = 30.0) -> None:
    """Join the default process group described by torchrun's environment; a lone process needs no environment at all.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, binds the process to its GPU, and does nothing when the
    group exists already. Collective over all processes when WORLD_SIZE is above 1, after ``meet``, whose errors it raises.
    Raises ``LaunchError`` when the environment is incomplete or names a GPU that does not exist.
    """
    import torch.distributed.nn.functional  # imported later, its default arguments would hold the group

    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise LaunchError(
                f"LOCAL_RANK={local} but this node shows {gpus} GPU(s); start at most {gpus} processes per node "
                "(torchrun --nproc-per-node) or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local)
    if dist.is_initialized():
        return
    meet(timeout_minutes)
    rank, world = rank_and_world()
    store = dist.HashStore() if world == 1 else _store
    dist.init_process_group(backend(), store=store, rank=rank, world_size=world, timeout=collective_timeout(timeout_minutes))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks: of the default group, before there is one of the environment."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet(timeout_minutes: float = 30.0, setting: str = "train.timeout_minutes") -> None:
    """Connect to what all ranks share (``shared_store``) and wait until all are there; torch would wait as well, and not say
    for whom. Nothing to do for a lone process, after an earlier call or where the default group exists.

    Raises ``LaunchError`` when the environment is incomplete. If ranks have not come within ``timeout_minutes``, one of the
    others raises ``StallError`` with their numbers, the rest ``PeerError``. ``setting`` is what messages call the timeout.
    """
    global _store
    rank, world = rank_and_world()
    if world == 1 or _store is not None or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise LaunchError(f"WORLD_SIZE={world} but {', '.join(missing)} not set; start the processes with torchrun")
    timeout = collective_timeout(timeout_minutes)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        # Without torchrun rank 0 itself holds the store: it waits for the others there, and they for it.
        if rank == 0 and "waiting for clients" not in str(error):
            raise
        who = "another rank" if rank == 0 else f"rank 0 ({os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']})"
        raise StallError(_not_come(who, timeout_minutes, setting)) from error
    store = dist.PrefixStore("default_pg", store)
    keys = [f"{STARTED}/{other}" for other in range(world)]
    store.set(keys[rank], this_process())
    try:
        store.wait(keys, timedelta(minutes=timeout_minutes))
    except RuntimeError as error:
        there = [store.check([key]) for key in keys]
        if rank != there.index(True):
            raise PeerError("a rank has not come") from error
        shown = some([str(other) for other in range(world) if not there[other]])
        raise StallError(_not_come(f"rank {shown}", timeout_minutes, setting)) from error
    _store = store


def _not_come(who: str, timeout_minutes: float, setting: str) -> str:
    return (
        f"{who} has not come to the start within {setting}={timeout_minutes:g}; look whether its process was started, and "
        "whether it stands still"
    )


def shared_store() -> dist.Store | None:
    """A connection of its own to what all ranks share, because another thread may be waiting in the first one. None for a
    lone process and before the ranks have met."""
    if rank_and_world()[1] == 1:
        return None
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else _store
    return None if store is None else store.clone()  # type: ignore[attr-defined]


def this_process() -> str:
    """How messages name this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def collective_timeout(minutes: float) -> timedelta:
    """What a process group is given for ``train.timeout_minutes``. NCCL ends the process with a raw trace: on GPUs it is a minute
    more, in which the run's ``Watch`` says which rank is missing."""
    return timedelta(minutes=minutes + (1 if torch.cuda.is_available() else 0))


def before_end(leave: Callable[[], None]) -> None:
    """Have ``end_distributed`` call ``leave``, which forgets process groups, before the groups are left. A second call with the
    same function changes nothing."""
    if leave not in _before_end:
        _before_end.append(leave)


def end_distributed() -> None:
    """Leave all process groups and wait for their threads; what holds a group (models, optimizers) must be out of scope.

    A gloo thread that frees its last tensor while Python shuts down aborts the process, although all work is done.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # DTensor's cache, so FSDP2's, holds meshes, and these hold groups
    for leave in _before_end:
        leave()
    dist.destroy_process_group()
    accelerator.collect_garbage()  # the threads live until the last reference to their group goes

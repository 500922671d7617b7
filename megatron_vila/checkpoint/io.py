"""What saving and loading share: the error, the agreement of all ranks on it, and plain values.

Every step that can fail on one rank alone runs inside ``on_all_ranks`` or ``on_rank_zero``: there it raises nothing until all
ranks know, so none waits in a collective for one that has given up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_vila.errors import UserError

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
    except Exception as error:
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


def some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _text(error: Exception) -> str:
    """Our own message; else kind and message, of what the operating system refused if that is behind the error."""
    if isinstance(error, CheckpointError):
        return str(error)
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    return f"{type(reason or error).__name__}: {reason or error}"

"""Runs an action on rank 0 or on each rank by itself, and lets all ranks know its outcome, so that none waits for a failed one.

Every step that can fail on one rank alone runs inside ``on_rank_zero`` or ``on_all_ranks``. These raise only when all ranks know
of the error, and then on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_vila.errors import CheckpointError, DamagedError, PeerError, UserError, refusal_behind, some

T = TypeVar("T")


def gathered(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``mine`` of each rank of ``group`` (None: all ranks), in the order of the ranks. An all-gather over ``group``."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def on_rank_zero(action: Callable[[], T], failed: str = "", cure: str = "") -> T:
    """The result of ``action`` on rank 0, on every rank (a broadcast over all ranks).

    If it fails, every rank raises. If a user can cure the error, rank 0 raises it, or with ``failed`` a ``CheckpointError`` of
    ``failed``, the reason and ``cure``; the others raise one with the same text. If it is a fault of the program, rank 0
    raises it and the others raise ``PeerError``.
    """
    outcome: list[Any] = [None, None]  # the result; of an error, its kind and text
    failure = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            if failed and _is_curable(error):
                failure = _error(isinstance(error, DamagedError), f"{failed}: {_reason(error)}", cure)
                failure.__cause__ = error
            outcome[1] = _kind(failure), str(failure)
    dist.broadcast_object_list(outcome, src=0)
    result, told = outcome
    if failure is not None:
        raise failure
    if told is not None:
        kind, text = told
        raise PeerError("rank 0 failed in what it does for all ranks") if kind is PeerError else _heard(kind(text))
    return result


def on_all_ranks(action: Callable[[], T], failed: str) -> T:
    """The result of ``action`` on this rank; if it raises on any, ``CheckpointError`` with that reason on all of them.

    Collective over all ranks, after the action. A file that is damaged for one rank and refused to another counts as refused.
    A fault of the program is raised on its rank as it is, and the others raise ``PeerError``.
    """
    try:
        result, told, failure = action(), None, None
    except Exception as error:
        told, failure = (_is_curable(error), isinstance(error, DamagedError), _reason(error)), error
    everywhere = gathered(told)
    bad = {rank: told for rank, told in enumerate(everywhere) if told is not None}
    if bad:
        where = "" if len(bad) == len(everywhere) else f" (rank {some(list(map(str, bad)))})"
        is_curable, is_damage, reason = min(bad.values(), key=lambda told: told[:2])
        if not is_curable:
            raise failure or PeerError("a rank failed in what each does by itself")
        raised = _error(is_damage, f"{failed}{where}: {reason}")
        if failure is None:
            raise _heard(raised)
        raise raised from failure
    return result


def _is_curable(error: Exception) -> bool:
    """Whether a user can cure it: our own messages say how, and so do refusals of the operating system."""
    return isinstance(error, UserError) or refusal_behind(error) is not None


def _heard(error: UserError) -> UserError:
    error.elsewhere = True
    return error


def _error(is_damage: bool, text: str, cure: str = "") -> CheckpointError:
    return (DamagedError if is_damage else CheckpointError)(text + (f"; {cure}" if cure else ""))


def _kind(error: Exception) -> type[Exception]:
    """The class that the other ranks raise: of our own errors only those that are made from their text alone."""
    return next((kind for kind in (DamagedError, CheckpointError, UserError) if isinstance(error, kind)), PeerError)


def _reason(error: Exception) -> str:
    """Our own message; otherwise kind and message of the error, or of the refusal of the operating system behind it."""
    if isinstance(error, CheckpointError):
        return str(error)
    reason = refusal_behind(error) or error
    return f"{type(reason).__name__}: {reason}"

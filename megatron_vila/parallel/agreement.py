"""What rank 0 does for all ranks, so that none waits for a rank that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_vila.errors import PeerError, UserError

T = TypeVar("T")


def from_rank_zero(action: Callable[[], T]) -> T:
    """The result of ``action`` on rank 0, on every rank (a broadcast over all ranks).

    Where it fails every rank raises: rank 0 its own error, the others a ``UserError`` with the same text, or ``PeerError`` for
    what no user can cure.
    """
    result, problem, failure = None, None, None
    if dist.get_rank() == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
            problem = str(error) if isinstance(error, UserError) else ""
    told = [result, problem]
    dist.broadcast_object_list(told, src=0)
    result, problem = told
    if failure is not None:
        raise failure
    if problem is not None:
        raise UserError(problem) if problem else PeerError("rank 0 failed in what it does for all ranks")
    return result

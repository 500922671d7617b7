"""What a rank says when it fails: one message for the cause, none for what only follows from it.

A rank that fails writes down why in the store that all ranks share, and then ends. The others lose their connection to it; they
find the cause in the store and end without a word. What each kind of failure shows:

* ``UserError``: its text, once for the run;
* a lost connection or a collective that timed out: nothing if a rank wrote down a cause, else which rank lost what;
* anything else: its traceback, once for the run if several ranks meet the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_vila import processes
from megatron_vila.data.loader import LoaderError
from megatron_vila.errors import PeerError, StallError, UserError
from megatron_vila.exit_codes import FAILED, INTERRUPTED, USER_ERROR
from megatron_vila.streams import tell

T = TypeVar("T")

PLACE = "megatron_vila/failure"
"""key in the store of what the first rank that failed wrote down"""
_SHOWN = 4
"""most ranks whose different causes are shown"""
_WAIT_S = 10.0
"""how long the store may take to answer"""
_CAUSE_S = 20.0
"""how long a rank that lost its connections waits for the cause to be written down: naming a rank that stands still takes others
some seconds"""
_LATE = re.compile(r"[Tt]imed out|[Tt]imeout|TIMEOUT")
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Ss]ocket [Tt]imeout|timeout|recvVector failed|"
    r"Failed to (recv|send)|failed to (recv|send)|NCCL communicator was aborted|ncclRemoteError|ncclSystemError"
)


def report(error: BaseException) -> int:
    """Say what must be said of ``error``, which ended this rank; returns the exit code. Call it where ``error`` is handled."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    cause = _cause(error)
    if isinstance(cause, StallError):
        return _report_stall(cause)
    if is_consequence(cause):
        return _report_consequence(cause)
    status = USER_ERROR if isinstance(cause, UserError) else FAILED
    number, is_new = _write_down(status, str(cause) if status == USER_ERROR else f"{type(cause).__name__}: {cause}")
    if number == 1:
        _tell_torchrun(cause, trace=status != USER_ERROR)
    if is_new and number <= _SHOWN:
        text = f"megatron_vila: {cause}" if status == USER_ERROR else "".join(traceback.format_exception(error)).rstrip()
        tell(text)
    return status


def is_late(error: BaseException | None) -> bool:
    """Whether ``error`` is a collective or a store that waited for its whole timeout."""
    return isinstance(error, RuntimeError) and not isinstance(error, UserError | StallError) and bool(_LATE.search(str(error)))


def is_consequence(error: BaseException) -> bool:
    """Whether ``error`` is what a rank sees when another one has gone."""
    if isinstance(error, UserError | StallError):
        return False
    if isinstance(error, PeerError):
        return True
    if isinstance(error, LoaderError):
        return error.__cause__ is None  # what another rank of the block reported
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    text = str(error)
    return isinstance(error, RuntimeError) and not alone and "CUDA error" not in text and bool(_LOST.search(text))


def await_cause(error: BaseException) -> None:
    """If ``error`` only follows from another rank's failure, wait until that one has written down why, for some time."""
    if is_consequence(_cause(error)):
        _first_failure(_CAUSE_S)


def _cause(error: BaseException) -> BaseException:
    """The loader reports what happened in its threads: on the rank where it happened that is the error that counts."""
    if isinstance(error, LoaderError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _report_consequence(error: BaseException) -> int:
    first = _first_failure(0.0)
    if first is not None:
        return first["status"]
    if isinstance(error, PeerError):
        return FAILED
    rank, _ = processes.rank_and_world()
    tell(
        f"megatron_vila: rank {rank} lost its connection to another rank, and none said why: a process was killed (kill -9, no "
        f"host memory left) or its node failed; the same command goes on from the last checkpoint ({error})"
    )
    return FAILED


def _report_stall(error: StallError) -> int:
    """Several ranks wait for the one that does not come, and see the same: the first one tells."""
    number, _ = _write_down(FAILED, str(error))
    if number > 1:
        first = _first_failure(0.0)
        return first["status"] if first else FAILED
    _tell_torchrun(error, trace=False)
    tell(f"megatron_vila: {error}")
    return FAILED


def _write_down(status: int, text: str) -> tuple[int, bool]:
    """Which failure of the run this is, from 1, and whether its text differs from the first one's."""
    store = _store()
    if store is None:
        return 1, True

    def write() -> int:
        number = store.add(f"{PLACE}s", 1)
        if number == 1:
            store.set(PLACE, json.dumps({"status": status, "text": text}))
        return number

    number = within(_WAIT_S, write)
    if number is None:
        return 1, True  # the process that keeps the store has ended or is stopped: whether another rank told is not known
    first = _first_failure(_WAIT_S) if number > 1 else None
    return number, first is None or first["text"] != text


def _first_failure(wait_s: float) -> dict | None:
    """What the first rank wrote down, or None if none has within ``wait_s``."""
    store, end = _store(), time.monotonic() + wait_s
    while store is not None:
        if within(_WAIT_S, lambda: store.check([PLACE])):
            return within(_WAIT_S, lambda: json.loads(store.get(PLACE)))
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return None


def _store() -> dist.Store | None:
    """What the ranks share, None for a lone rank."""
    return within(_WAIT_S, processes.shared_store)


def within(seconds: float, action: Callable[[], T]) -> T | None:
    """The result of ``action``, None if it fails or takes longer: a store whose process is stopped never answers."""
    found: list[T] = []

    def act() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _tell_torchrun(error: BaseException, trace: bool) -> None:
    """Under torchrun, name this rank and its error in the launcher's report as the first failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"timestamp": str(int(time.time()))}
    if trace:
        details["py_callstack"] = "".join(traceback.format_exception(error))
    content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": details}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(content))

"""What a rank prints and writes when it fails: the first failure of the run is printed once, each rank writes its own file.

A rank that fails writes what happened into ``OUTPUT/failures/rank-N.txt`` and into the store that all ranks share
(``failure_board.py``), which knows the failure that counts. What each kind shows on the screen:

* a cause: the text of a ``UserError``, the traceback of anything else, which rank failed first, and the folder;
* a stall: who did not come;
* a consequence (a lost connection, what another rank reported): nothing if there is a cause, else which rank lost what.

The first rank prints, after a moment in which an earlier failure can still arrive. The others end after it, so that a launcher
sees it end first. All end with its exit code.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from megatron_vila import processes
from megatron_vila.errors import PeerError, StallError, UserError, cause_of, described, exit_code
from megatron_vila.exit_codes import INTERRUPTED
from megatron_vila.failing import failure_files
from megatron_vila.failing.failure_board import CAUSE, CONSEQUENCE, STALL, Board, Failure, within
from megatron_vila.streams import tell

_CAUSE_S = 20.0
"""how long a rank that lost its connections waits until another one has written down the cause, which takes some seconds if that
one has to find out which rank hangs"""
_SETTLE_S = 1.0
"""how long the first failure waits for an earlier one that is still on its way"""
_TELL_S = 5.0
"""how long others wait for the first rank to print"""
_LEAVE_S = 0.5
"""how much later than the first rank the others end; a launcher looks at its processes several times in it"""
_MOST_TEXT = 4000
_LATE = re.compile(r"[Tt]imed out|[Tt]imeout|TIMEOUT")
_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Ss]ocket [Tt]imeout|timeout|recvVector failed|"
    r"Failed to (recv|send)|failed to (recv|send)|NCCL communicator was aborted|ncclRemoteError|ncclSystemError"
)


def is_late(error: BaseException | None) -> bool:
    """Whether ``error`` comes from a collective or a store that waited for its whole timeout."""
    return isinstance(error, RuntimeError) and not isinstance(error, UserError | StallError) and bool(_LATE.search(str(error)))


def is_consequence(error: BaseException) -> bool:
    """Whether ``error`` is what a rank meets when another one has failed or ended."""
    if isinstance(error, UserError):
        return error.elsewhere
    if isinstance(error, StallError):
        return False
    if isinstance(error, PeerError):
        return True
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    text = str(error)
    return isinstance(error, RuntimeError) and not alone and "CUDA error" not in text and bool(_LOST.search(text))


class Reporter:
    """Prints and writes what is to be known when this rank fails; a process has one. ``doing`` says where the rank is, and
    ``goes_on`` how the command goes on after a failure that is not the user's."""

    def __init__(self, goes_on: str = "the same command continues from the last checkpoint") -> None:
        self.goes_on = goes_on
        self.doing: Callable[[], str] = lambda: "starting"
        self._folder: Path | None = None
        self._happened: tuple[float, str] | None = None
        self._written: tuple[Failure, Board, bool] | None = None

    def keep_in(self, output: str | Path) -> None:
        """From now on a failure leaves a file in the run's folder ``output``, which this run holds."""
        self._folder = Path(output) / failure_files.FOLDER

    def note(self) -> tuple[float, str]:
        """When the rank failed, in seconds since 1970, and what it was doing. Called at once, because what a rank does before
        ``report`` takes time."""
        self._happened = self._happened or (time.time(), self.doing())
        return self._happened

    def await_cause(self, error: BaseException) -> None:
        """If ``error`` only follows from another rank's failure, wait (``_CAUSE_S`` at most) until that one has written why."""
        if is_consequence(cause_of(error)):
            _, board, _ = self._write_down(error)
            board.first(_CAUSE_S, at_most=STALL)

    def report(self, error: BaseException) -> int:
        """Print and write what is to be known of ``error``, which ended this rank; returns the exit code, equal on all ranks."""
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED
        mine, board, is_kept = self._write_down(error)
        if mine.kind != CONSEQUENCE:
            board.settle(_SETTLE_S)
        first = board.first() or mine
        if self._folder is not None and is_kept and processes.rank_and_world()[1] > 1:
            failure_files.write(self._folder, mine, error, first)
        _tell_torchrun(mine, first)
        if first == mine:
            # Ranks that have not met know nothing of each other: one that only heard of another's failure leaves it to that one.
            if (board.is_shared or not isinstance(cause_of(error), PeerError)) and board.claim(mine.text):
                tell("\n".join([self._shown(mine, error, is_kept), *board.untold()]))
            board.told()
            return mine.status
        if not board.await_told(_TELL_S) and mine.kind != CONSEQUENCE and board.claim(mine.text):
            tell(self._shown(mine, error, is_kept))  # the first rank was killed before it had printed
        time.sleep(_LEAVE_S)
        return first.status

    def _write_down(self, error: BaseException) -> tuple[Failure, Board, bool]:
        """This rank's failure, written to its file and to the store, and whether there is a file."""
        if self._written is None:
            (time_s, doing), (rank, _) = self.note(), processes.rank_and_world()
            cause = cause_of(error)
            kind = CONSEQUENCE if is_consequence(cause) else STALL if isinstance(cause, StallError) else CAUSE
            status = exit_code(error)
            text = str(cause) if isinstance(cause, UserError | StallError) else f"{type(cause).__name__}: {cause}"
            failure = Failure(
                kind, time_s, rank, processes.this_process(), status=status, doing=doing, text=text[:_MOST_TEXT]
            )
            is_kept = self._folder is not None and failure_files.write(self._folder, failure, error)
            board = Board()
            board.write(failure, described(error)[-4 * _MOST_TEXT :])
            self._written = failure, board, is_kept
        return self._written

    def _shown(self, failure: Failure, error: BaseException, is_kept: bool) -> str:
        """What happened, and in a last line which rank failed first and where the files are."""
        alone = processes.rank_and_world()[1] == 1
        cause, where = cause_of(error), [f"what each rank was doing: {self._folder}"] if is_kept else []
        if failure.kind == STALL:
            return "\n  ".join([f"megatron_vila: {cause}", *where])
        if isinstance(cause, UserError):
            # For a lone rank the message with its cure is enough.
            return "\n  ".join([described(error), *("; ".join([failure.headline, place]) for place in where if not alone)])
        if failure.kind == CONSEQUENCE:
            lost = (
                f"rank {failure.rank} lost its connection to another rank, and none said why: a process was killed (kill -9, no "
                f"host memory left) or its node failed; {self.goes_on} ({cause})"
            )
            return "\n  ".join([f"megatron_vila: {cause if isinstance(cause, PeerError) else lost}", *where])
        if alone and not where:
            return described(error)
        return "\n".join([described(error), f"megatron_vila: {'; '.join([failure.headline, *where])}"])


def _tell_torchrun(mine: Failure, first: Failure) -> None:
    """Record the failure as torch.distributed.elastic does, for the launcher's report.

    The launcher takes the earliest failure for the root cause, by whole seconds, and of several the one of the lowest rank. So
    all failures but the first are recorded as later ones.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    time_s, text = int(mine.time_s), mine.text
    if mine != first:
        time_s, text = max(time_s, int(first.time_s) + 1), f"{text}; {first.headline}: {first.text}"
    details = {"timestamp": str(time_s), "first": first.headline, "is_first": mine == first}
    content = json.dumps({"message": {"message": text, "extraInfo": details}})
    within(_SETTLE_S, lambda: Path(path).write_text(content))

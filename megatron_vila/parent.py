"""A rank ends with the launcher that started it: ``kill -9`` of torchrun must not leave ranks that train on unseen."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
LAUNCHED = ("TORCHELASTIC_RUN_ID",)
"""what a launcher leaves in the environment of its ranks; a process without it was started by hand and stays on its own"""

PARENT_AT_START = os.getppid()


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Under a launcher, ask Linux for the signal ``number`` when the parent ends: at a SIGTERM the run saves and stops as usual.

    Call it from the main thread; a later call takes the place of an earlier one. A parent that ended before is noticed too.
    """
    if not any(name in os.environ for name in LAUNCHED) or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != PARENT_AT_START:
        os.kill(os.getpid(), number)

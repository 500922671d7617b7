"""Signals that ask a run to stop: the current step is finished and saved, then every rank ends with ``exit_codes.STOPPED``."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""SIGTERM and SIGUSR1 of schedulers and launchers, Ctrl-C, and SIGHUP of a terminal that is closed. A second Ctrl-C ends the
process at once."""


def asking() -> tuple[signal.Signals, ...]:
    """``ASKING``, without SIGHUP if this process ignores it, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in ASKING if number != signal.SIGHUP or not ignored)


class StopRequest:
    """Notes the first of the signals ``asking()`` that this process gets after ``install``; they do nothing else to the process.

    As a context manager it restores the earlier handlers at the end, unless ``install`` was called before the ``with`` block.
    Python handles signals in the main thread only: in another one ``install`` has no effect.
    """

    def __init__(self) -> None:
        self.signal = 0
        """number of the signal, 0 without one"""
        self._before: dict[int, Any] = {}
        self._depth = 0

    def install(self) -> None:
        """Note the signals from now on."""
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in asking()}
            # A launcher may have blocked the signals up to here: one that was sent during the imports arrives now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)

    def ignore_further(self) -> None:
        """Ignore the signals from now on: what a launcher sends to the last processes must not change how this one ends."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Ctrl-C ends what stderr is piped into (tee) too. print() is not safe in a signal handler.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after the current step; Ctrl-C again ends at once, without a checkpoint\n")
        self.signal = self.signal or number

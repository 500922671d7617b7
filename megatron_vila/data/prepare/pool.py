"""Processes that prepare media, each alone with one medium: a file that ends its process is the fault of one sample.

They begin as copies of a server process that has the modules loaded and holds no thread and no decoder.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from megatron_vila.errors import UserError

_PR_SET_PDEATHSIG = 1


class DiedError(UserError):
    """A process ended while it prepared a medium, twice."""


class Pool:
    """``count`` processes; with 0 the work is done in this one, when it is asked for. A context manager, which ends them."""

    def __init__(self, count: int) -> None:
        self._threads = ThreadPoolExecutor(count) if count else None
        self._mine = threading.local()
        self._workers: list[_Worker] = []
        self._closed = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        for worker in list(self._workers):
            worker.end()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """The future of ``work(*arguments)``; it raises ``DiedError`` if the process ends in it."""
        if self._threads is not None:
            return self._threads.submit(self._in_process, work, arguments)
        done: Future = Future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def _in_process(self, work: Callable[..., Any], arguments: tuple) -> Any:
        for _ in range(2):  # the system may have ended it for want of memory while others were large
            if self._closed:
                break
            worker = getattr(self._mine, "worker", None)
            if worker is None:
                worker = self._mine.worker = _Worker()
                self._workers.append(worker)
            try:
                return worker.call(work, arguments)
            except (EOFError, ConnectionError):
                self._workers.remove(worker)
                worker.end()
                self._mine.worker = None
        raise DiedError(
            "the process that read it ended twice: the file crashes the decoder, or the memory is too small for it"
        )


class _Worker:
    """A process that does one piece of work after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_vila.data.prepare.medium"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the line

    def call(self, work: Callable[..., Any], arguments: tuple) -> Any:
        """What ``work`` returns or raises. Raises ``EOFError`` or ``ConnectionError`` if the process ends."""
        self._connection.send((work, arguments))
        value, error = self._connection.recv()
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        self._process.kill()


def _serve(connection: Connection) -> None:
    """In the process: Ctrl-C is for the one that started it, and it does not outlive that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            return
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            work, arguments = connection.recv()
            answer: tuple[Any, Exception | None]
            try:
                answer = work(*arguments), None
            except Exception as error:
                answer = None, error
            connection.send(answer)

"""Ctrl-C before the ``main`` of a command has begun, and after its end: one line and the status 130.

A command imports for seconds. ``KeyboardInterrupt`` out of an import leaves tracebacks of other packages, is lost in some of
them, and ends Python by a signal. Within ``main`` it is raised as always, so that what is open is closed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from megatron_vila.exit_codes import INTERRUPTED
from megatron_vila.streams import tell

TOLD = "megatron_vila: interrupted"


def is_command() -> bool:
    """Whether this process is a command of this package that begins: ``python -m megatron_vila...`` or a file of tools/. Not so
    for other programs that import the package, and for processes that a command starts."""
    if sys.argv[:1] == ["-m"]:  # stands there while Python looks for the module
        return any(word.removeprefix("-m").startswith("megatron_vila") for word in sys.orig_argv[1:])
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve().parent == Path(__file__).resolve().parents[1] / "tools"


def end_at_once() -> None:
    """From now on Ctrl-C ends this process, whatever it does."""
    signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block Ctrl-C raises ``KeyboardInterrupt`` where it would end the process at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            end_at_once()


def _end(number: int, frame: FrameType | None) -> None:
    tell(TOLD)
    os._exit(INTERRUPTED)

"""The two kinds of errors: what a user can cure, and everything else; how messages are made, and what a command says of each.

A ``UserError`` ends a command with its text as the only message. Any other exception is a fault of the program or of the machine
and keeps its traceback. Every entry point is an ``entry_point``; a run of several ranks tells in ``failing/failures.py`` what a
single process tells here.
"""

from __future__ import annotations

import errno
import functools
import io
import traceback
from collections.abc import Callable, Sequence
from typing import ParamSpec

from megatron_vila import interrupts
from megatron_vila.exit_codes import FAILED, INTERRUPTED, USER_ERROR
from megatron_vila.streams import tell

P = ParamSpec("P")


class UserError(Exception):
    """Something a user can cure; the text names what was set or found, and what to do."""

    elsewhere = False
    """whether another rank found it: this one only heard of it"""


class SettingError(UserError, ValueError):
    """A setting that cannot be used, alone or with others; the text names it, its value and the cure."""


class ConfigError(SettingError):
    """A configuration that cannot be used; the message lists every problem with its cure."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or snapshot cannot be saved or loaded; the text says why, what is intact and what to do. On every rank."""

    def worded(self, text: str) -> CheckpointError:
        """The same error with another text."""
        error = type(self)(text)
        error.elsewhere = self.elsewhere
        return error


class DamagedError(CheckpointError):
    """The files of a checkpoint or snapshot are not what was written. Only for this is a checkpoint passed over and renamed."""


class LaunchError(UserError, RuntimeError):
    """The processes were started in a way that cannot work; the text says how to start them."""


class PeerError(RuntimeError):
    """A rank failed, and says why; the others end without a word. ``__cause__`` is what failed, on the rank that failed."""


class StallError(RuntimeError):
    """Ranks waited ``train.timeout_minutes`` for others; the text names those that did not come, and where they stand."""


def some(names: Sequence[str], shown: int = 8) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def refusal_behind(error: BaseException) -> BaseException | None:
    """What the operating system refused, if that is behind ``error``: it says nothing about the content of a file."""
    reason: BaseException | None = error
    while reason is not None and not _is_refusal(reason):
        reason = reason.__cause__ or reason.__context__
    return reason


def _is_refusal(error: BaseException) -> bool:
    # What Python's own files cannot do, and a place to read at that no file has: the content asked for it.
    if isinstance(error, io.UnsupportedOperation) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return False
    # torch has no class of its own for host memory.
    return isinstance(error, (OSError, MemoryError)) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def cause_of(error: BaseException) -> BaseException:
    """What failed on this rank, if ``error`` passes it on to others."""
    return error.__cause__ if isinstance(error, PeerError) and error.__cause__ is not None else error


def exit_code(error: BaseException) -> int:
    """What a process ends with that ``error`` ends."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USER_ERROR if isinstance(cause_of(error), UserError) else FAILED


def described(error: BaseException) -> str:
    """What the screen shows of ``error``: the text of a ``UserError``, a line for Ctrl-C, the traceback of anything else."""
    if isinstance(error, KeyboardInterrupt):
        return interrupts.TOLD
    cause = cause_of(error)
    if isinstance(cause, UserError):
        return f"megatron_vila: {cause}"
    return "".join(traceback.format_exception(error)).rstrip()


def entry_point(main: Callable[P, int]) -> Callable[P, int]:
    """``main`` returns an exit code; an error that comes out of it is told and has its exit code too, and so has Ctrl-C."""

    @functools.wraps(main)
    def told(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            with interrupts.raised():
                return main(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            tell(described(error))
            return exit_code(error)

    return told

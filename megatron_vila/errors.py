"""The two kinds of errors, what a user can cure and everything else, and how messages are made.

A ``UserError`` ends a run with its text as the only message. Any other exception is a fault of the program or of the machine
and keeps its traceback.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence


class UserError(Exception):
    """Something a user can cure; the text names what was set or found, and what to do."""


class SettingError(UserError, ValueError):
    """A setting that cannot be used, alone or with others; the text names it, its value and the cure."""


class ConfigError(SettingError):
    """A configuration that cannot be used; the message lists every problem with its cure."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved or loaded; the text says why, what is intact and what to do. Raised on every rank."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not what was written: the one reason for which a checkpoint is passed over and renamed."""


class LaunchError(UserError, RuntimeError):
    """The processes were started in a way that cannot work; the text says how to start them."""


class PeerError(RuntimeError):
    """Another rank failed, and says why; this one ends without a word."""


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

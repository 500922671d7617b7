"""stdout and stderr that take no more (a closed terminal or pipe, a full disk) change nothing of how a process ends."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


def tell(text: str) -> None:
    """Print ``text`` on stderr, if it takes it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End the process with ``status``, whatever threads and streams are left in it.

    At once: the ranks have parted, and from here on nobody but the launcher waits for this one.
    """
    flush_streams()
    # Threads of broken groups and of decoders would be waited for.
    os._exit(status)


def flush_streams() -> None:
    """Flush stdout and stderr. What one does not take is dropped, with all that follows: else Python fails on it at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed before the process began
            continue
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

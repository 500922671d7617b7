"""stdout and stderr that take no more (a closed terminal or pipe, a full disk) change nothing of how a process ends."""

from __future__ import annotations

import contextlib
import os
import sys


def tell(text: str) -> None:
    """Print ``text`` on stderr, if it takes it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def flush_streams() -> None:
    """Flush stdout and stderr. What one does not take is dropped, with all that follows: else Python fails on it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

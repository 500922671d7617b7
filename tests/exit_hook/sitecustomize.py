"""With this folder on PYTHONPATH a process writes which threads it still has when Python ends: a file in THREADS_AT_EXIT."""

import atexit
import os
from pathlib import Path


def _write_threads() -> None:
    names = sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    Path(os.environ["THREADS_AT_EXIT"], f"{os.getpid()}.threads").write_text("\n".join(names))


if "THREADS_AT_EXIT" in os.environ:
    atexit.register(_write_threads)

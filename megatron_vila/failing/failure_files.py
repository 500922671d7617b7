"""``OUTPUT/failures/rank-N.txt``: the file that a failing rank writes, for those who look for the reason later."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from datetime import datetime
from pathlib import Path

from megatron_vila.failing.failure_board import CONSEQUENCE, STALL, Failure, within
from megatron_vila.plain_files import replace_file

logger = logging.getLogger(__name__)

FOLDER = "failures"
_WAIT_S = 10.0
"""how long a file server may take, so that it cannot keep a failed rank from ending"""


def set_aside_earlier(output: str | Path) -> None:
    """Rename what an earlier start in the folder ``output`` left, after the time of its last file: ``failures-20261130-154508``.
    So ``failures`` is always of this start, and nothing is lost. Called by the one rank that holds the lock."""
    folder = Path(output) / FOLDER
    try:
        if folder.is_symlink() or not folder.is_dir() or not any(folder.iterdir()):
            return
        name = f"{FOLDER}-{datetime.fromtimestamp(folder.stat().st_mtime):%Y%m%d-%H%M%S}"
        names = (name, *(f"{name}-{number}" for number in range(2, 100)))
        folder.rename(next(place for place in map(folder.with_name, names) if not place.exists()))
    except (OSError, StopIteration) as error:
        logger.warning("%s of an earlier start cannot be renamed (%s): a rank that fails writes over its file", folder, error)


def write(folder: Path, failure: Failure, error: BaseException, first: Failure | None = None) -> bool:
    """Write the file of the rank that ``failure`` is of into ``folder``; ``first`` is the failure that counts, once it is known.
    Returns whether it could be written."""
    path, text = folder / f"rank-{failure.rank}.txt", describe(failure, error, first)

    def replace() -> bool:
        replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))
        return True

    return bool(within(_WAIT_S, replace))


def describe(failure: Failure, error: BaseException, first: Failure | None) -> str:
    """The content of the file: which rank failed, when and where; how that relates to the first failure; the whole traceback with
    its causes. In another thread than the main one, which ends a rank that hangs, also the stack of the main thread."""
    lines = [
        f"rank {failure.rank}, {failure.process}",
        f"failed at {_at(failure.time_s)}, doing: {failure.doing}",
    ]
    if failure.kind == CONSEQUENCE:
        lines.append("This is a consequence: another rank failed before, and this one met that.")
    elif failure.kind == STALL:
        lines.append("This is a stall: this rank waited for others that did not come.")
    if first is not None and first.rank != failure.rank:
        lines.append(f"The failure that counts: {first.headline}, at {_at(first.time_s)}: {first.text}")
    elif first is not None:
        lines.append("This is the failure that counts.")
    lines += ["", "".join(traceback.format_exception(error)).rstrip()]
    main = threading.main_thread()
    if threading.current_thread() is not main and (frame := sys._current_frames().get(main.ident or 0)) is not None:
        lines += ["", "Where its main thread stands (most recent call last):", "".join(traceback.format_stack(frame)).rstrip()]
    return "\n".join(lines) + "\n"


def _at(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).astimezone().isoformat(sep=" ", timespec="milliseconds")

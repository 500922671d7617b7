"""What stands at a path, asked before it is opened or replaced: a pipe would be waited for, a folder cannot be replaced."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path


def has_kind(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether ``path`` is there and, links followed, of ``kind`` (``stat.S_ISREG``, ``stat.S_ISDIR``).

    Raises ``OSError`` where the system does not tell, which ``Path.is_file`` of some versions of Python takes for a no.
    """
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def require_replaceable(path: Path, temporary: Path) -> None:
    """Raise ``OSError`` unless ``temporary`` can be written and then renamed to ``path``."""
    for place, wrong in ((temporary, lambda mode: not stat.S_ISREG(mode)), (path, stat.S_ISDIR)):
        try:
            mode = os.lstat(place).st_mode
        except FileNotFoundError:
            continue
        if wrong(mode):
            raise OSError(errno.EEXIST, "no plain file stands there; remove it", str(place))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """``write(temporary)``, then put the temporary file in the place of ``path``; a failure leaves the old file and no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    require_replaceable(path, temporary)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

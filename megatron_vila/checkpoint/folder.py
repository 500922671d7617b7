"""The folder of a run's checkpoints: which names are ours, which one is the newest, how one appears and how old ones go.

    checkpoints/step-00000100       one checkpoint; saved again at the same step: step-00000100-1
    checkpoints/latest              the name of the newest finished one
    checkpoints/.step-00000100.*    being written (.partial) or deleted (.deleted)

Only names of exactly this form are ours. Everything else (``step-00000100-best``, a ``.bak``) is neither loaded nor deleted.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from megatron_vila.checkpoint.io import flush, open_plain
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.plain_files import has_kind, require_replaceable

logger = logging.getLogger(__name__)

INFO, LATEST = "info.json", "latest"
_NEXT_LATEST = ".latest"
_LONGEST_NAME = 1 << 12
_STEP = r"step-([0-9]{8}|[1-9][0-9]{8,})(?:-([1-9][0-9]*))?"
_NAME, _HIDDEN = re.compile(_STEP), re.compile(rf"\.{_STEP}\.(partial|deleted)")


def order(folder: Path) -> tuple[int, int]:
    """(step, number of the save at that step). Raises ``ValueError`` if the name is not ours."""
    found = _NAME.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder} is not the folder of a checkpoint")
    return int(found[1]), int(found[2] or 0)


def is_ours(folder: Path) -> bool:
    return _NAME.fullmatch(folder.name) is not None


def is_finished(folder: Path) -> bool:
    return has_kind(folder / INFO, stat.S_ISREG)


def finished(root: Path) -> list[Path]:
    """Finished checkpoints, the oldest step first."""
    return [folder for folder in _folders(root) if is_finished(folder)]


def named_latest(root: Path) -> Path | None:
    """What ``latest`` names, if it is there, finished or not. Raises ``CheckpointError`` if ``latest`` is not a plain file."""
    pointer = root / LATEST
    if not os.path.lexists(pointer):
        return None
    try:
        with open_plain(pointer) as file:
            name = file.read(_LONGEST_NAME).decode(errors="replace").strip()
    except DamagedError as error:
        raise CheckpointError(f"{pointer}: {error}; remove it, then the last step there is the newest checkpoint") from error
    return root / name if _NAME.fullmatch(name) and has_kind(root / name, stat.S_ISDIR) else None


def newest_first(run_folder: str | Path) -> list[Path]:
    """The checkpoint that ``latest`` names, then those of earlier saves; without ``latest`` all there are.

    Later steps than ``latest`` says are left by a run that was set back by hand. Those without info.json are listed too: a
    checkpoint gets its name when it is complete, so they are damaged and not to be passed over without a word. Raises
    ``CheckpointError`` and ``OSError`` where the folder cannot be read.
    """
    root = Path(run_folder) / "checkpoints"
    named, known = named_latest(root), _folders(root)
    if named is None:
        if known and os.path.lexists(root / LATEST):
            logger.warning("%s names no checkpoint that is there: %s is the newest", root / LATEST, known[-1].name)
        return known[::-1]
    return [named, *(folder for folder in known[::-1] if order(folder) < order(named))]


def to_resume(run_folder: str | Path) -> list[Path]:
    """What a run could continue from: ``newest_first``. Raises ``CheckpointError`` if there was a checkpoint and none is left."""
    known, pointer = newest_first(run_folder), Path(run_folder) / "checkpoints" / LATEST
    if not known and os.path.lexists(pointer):
        raise CheckpointError(
            f"{pointer} tells of a checkpoint, and none is there any more; restore it from a copy, or remove that file to start "
            "the run anew"
        )
    return known


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest checkpoint of a run's folder (the one that ``latest`` names, if it is there), or None."""
    return next(iter(newest_first(run_folder)), None)


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: ``path`` itself, or the newest one of a run's folder. Raises ``CheckpointError``."""
    if is_finished(path) or (is_ours(path) and has_kind(path, stat.S_ISDIR)):
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            "no finished checkpoint there; give the folder of a step (step-...) or the folder of a run"
        )
    return newest


def make_room(root: Path, step: int) -> tuple[Path, Path]:
    """Clean up and make a hidden folder to write into; returns it and the place where it will go.

    A checkpoint of the same step is not overwritten: there would be a moment without any.
    """
    root.mkdir(parents=True, exist_ok=True)
    # Asked again when it is replaced; here before much is written.
    require_replaceable(root / LATEST, root / _NEXT_LATEST)
    clean(root)
    saves = [order(folder)[1] for folder in _ours(root) if order(folder)[0] == step]
    name = f"step-{step:08d}" + (f"-{max(saves) + 1}" if saves else "")
    partial = root / f".{name}.partial"
    partial.mkdir()
    return partial, root / name


def clean(root: Path) -> None:
    """Remove what crashes and failed saves left."""
    for left_over in sorted(root.iterdir()):
        if _HIDDEN.fullmatch(left_over.name):
            _remove(left_over)


def publish(partial: Path, final: Path) -> None:
    """Make a complete hidden folder the newest checkpoint. A crash between any two lines leaves a loadable one."""
    # Written first: on a full disk this fails before anything has changed.
    pointer = _pointer_to(final)
    flush(partial)
    partial.rename(final)
    flush(final.parent)
    os.replace(pointer, final.parent / LATEST)
    flush(final.parent)


def delete_older(final: Path, keep: int) -> None:
    """Delete earlier saves of the same step and all but the ``keep`` newest checkpoints up to ``final`` (0 keeps all).

    Later steps, left by a run that was set back by hand, are never deleted. What cannot be deleted is only reported: the new
    checkpoint is in place.
    """
    try:
        older = [folder for folder in finished(final.parent) if order(folder) < order(final)]
    except OSError as error:
        logger.warning("old checkpoints are not deleted: %s", error)
        return
    same_step = [folder for folder in older if order(folder)[0] == order(final)[0]]
    others = [folder for folder in older if folder not in same_step]
    for folder in [*same_step, *(others[: 1 - keep or None] if keep > 0 else [])]:
        # Hidden first, so that a half-deleted checkpoint is never taken for a finished one.
        hidden = folder.with_name(f".{folder.name}.deleted")
        try:
            folder.rename(hidden)
        except OSError as error:
            logger.warning("old checkpoint %s is not deleted: %s", folder, error)
        else:
            _remove(hidden)


def set_aside(damaged: Iterable[Path], whole: Path) -> list[Path]:
    """Make ``whole`` the newest checkpoint and give ``damaged`` ones names that are not ours, so that they are never loaded,
    counted or deleted again; returns their new places."""
    os.replace(_pointer_to(whole), whole.parent / LATEST)
    places = []
    for folder in damaged:
        place, number = folder.with_name(f"{folder.name}.damaged"), 1
        while place.exists():
            place, number = folder.with_name(f"{folder.name}.damaged-{number}"), number + 1
        folder.rename(place)
        places.append(place)
    flush(whole.parent)
    return places


def _pointer_to(folder: Path) -> Path:
    """A file on the disk that is ready to become ``latest``."""
    pointer = folder.parent / _NEXT_LATEST
    require_replaceable(folder.parent / LATEST, pointer)
    pointer.write_text(folder.name + "\n")
    flush(pointer)
    return pointer


def _ours(root: Path) -> list[Path]:
    """Everything there with a name of ours. Raises ``CheckpointError`` if ``root`` is not a folder, ``OSError`` if unreadable."""
    try:
        return [path for path in root.iterdir() if is_ours(path)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        if os.path.lexists(root):
            raise CheckpointError(f"{root} must be a folder; move away what stands there") from None
        return []


def _folders(root: Path) -> list[Path]:
    """Checkpoints, finished or not, the oldest step first."""
    return sorted((path for path in _ours(root) if has_kind(path, stat.S_ISDIR)), key=order)


def _remove(path: Path) -> None:
    """What cannot be removed (a network file system holds deleted files that are open elsewhere) is tried again next time."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s is not removed: %s", path, error)

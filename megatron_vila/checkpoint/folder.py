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
from collections.abc import Iterable
from pathlib import Path

from megatron_vila.checkpoint.io import CheckpointError, flush

logger = logging.getLogger(__name__)

INFO = "info.json"
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
    return (folder / INFO).is_file()


def finished(root: Path) -> list[Path]:
    """Finished checkpoints, the oldest step first."""
    return sorted(filter(is_finished, _ours(root)), key=order)


def named_latest(root: Path) -> Path | None:
    """What ``latest`` names, if it is there, finished or not."""
    pointer = root / "latest"
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return root / name if _NAME.fullmatch(name) and (root / name).is_dir() else None


def newest_first(run_folder: str | Path) -> list[Path]:
    """What a run could go on from: the checkpoint that ``latest`` names, then finished ones of earlier saves.

    Later steps than ``latest`` says are left by a run that was set back by hand. The first one may be unfinished, if somebody
    has taken its info.json away.
    """
    root = Path(run_folder) / "checkpoints"
    named, known = named_latest(root), finished(root)
    if named is None:
        if known and (root / "latest").is_file():
            logger.warning("%s names no checkpoint that is there: %s is the newest", root / "latest", known[-1].name)
        return known[::-1]
    return [named, *(folder for folder in known[::-1] if order(folder) < order(named))]


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """The newest finished checkpoint of a run's folder (the one that ``latest`` names, if it is there), or None."""
    root = Path(run_folder) / "checkpoints"
    named, known = named_latest(root), finished(root)
    if named in known:
        return named
    return known[-1] if known else None


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: ``path`` itself, or the newest finished one of a run's folder. Raises ``CheckpointError``."""
    if is_finished(path) or (is_ours(path) and path.is_dir()):
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
    os.replace(pointer, final.parent / "latest")
    flush(final.parent)


def delete_older(final: Path, keep: int) -> None:
    """Delete earlier saves of the same step and all but the ``keep`` newest checkpoints up to ``final`` (0 keeps all).

    Later steps, left by a run that was set back by hand, are nobody's to delete. What cannot be deleted is told, no more: the
    new checkpoint is in place.
    """
    older = [folder for folder in finished(final.parent) if order(folder) < order(final)]
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
    os.replace(_pointer_to(whole), whole.parent / "latest")
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
    pointer = folder.parent / ".latest"
    pointer.write_text(folder.name + "\n")
    flush(pointer)
    return pointer


def _ours(root: Path) -> list[Path]:
    return [folder for folder in root.iterdir() if is_ours(folder)] if root.is_dir() else []


def _remove(path: Path) -> None:
    """What cannot be removed (a network file system holds deleted files that are open elsewhere) is tried again next time."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s is not removed: %s", path, error)

"""An output folder that appears complete or not at all.

Files are written into a hidden folder beside it, flushed to the disk, and the folder is renamed at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vila.checkpoint.io import flush
from megatron_vila.convert.errors import ConversionError

_OURS = ("config.json", "config.yaml", "adapter_config.json")


def output_problems(out: Path, sources: list[Path], overwrite: bool) -> list[str]:
    """Why ``out`` cannot be written, each reason with its cure; ``sources`` are the folders that the conversion reads."""
    if any(out.resolve() in (path.resolve(), *path.resolve().parents) for path in sources):
        return [f"{out} is the source, or a folder that holds it; choose another output folder"]
    if not out.exists():
        return []
    if not out.is_dir():
        return [f"{out} is a file; give another output folder"]
    if any(out.iterdir()):
        if not overwrite:
            return [f"{out} exists and is not empty; give another output folder, or --overwrite to replace it"]
        if not any((out / name).is_file() for name in _OURS):
            return [f"{out} holds no converted model, so --overwrite does not replace it; delete it yourself"]
    return []


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes ``out`` (replacing it) if the ``with`` block ends without an exception.

    A crash leaves only folders with hidden names, which the next attempt removes. Raises ``ConversionError`` if writing fails.
    """
    partial, old = (out.parent / f".{out.name}.{what}" for what in ("partial", "replaced"))
    try:
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.rglob("*"):
            flush(path)
        flush(partial)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        flush(out.parent)
    except OSError as error:
        raise ConversionError(
            f"{out} was not written", [f"{error}; free space, or choose an output folder that can be written"]
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

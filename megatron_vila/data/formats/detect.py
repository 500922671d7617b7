"""What stands under a path: the formats in which sets are kept, told by what is there and never guessed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

from megatron_vila.data.fields import MEDIA_ENDINGS, RecordError

METADATA = ("metadata.csv", "metadata.jsonl")
"""The table of a folder of media, as the datasets library has it."""

IN_PLACE = {
    "json": "a JSON file with one list of records",
    "jsonl": "a JSONL file, one record a line",
    "energon": "a folder with Energon's index of its shards",
    "wids": "a folder of VILA's WebDataset with wids-meta.json",
    "tar": "a WebDataset tar file, or a folder of them",
}
"""Formats that training reads as they are, and what each is in words."""

PREPARED = {
    "parquet": "a parquet file, or a folder of them",
    "folder": "a folder of media with captions of the same names (.txt, .json) or with metadata.csv or metadata.jsonl",
    "text_files": "a text file, or a folder of them, each one document",
    "text_lines": "a text file with one document a line",
}
"""Formats that are converted first."""

FORMATS = IN_PLACE | PREPARED

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
"""Endings of files that hold others in a form that is not read: shards and records in them would be overlooked."""

_COMMAND = "python tools/prepare_data.py"


def detect(path: str, wanted: str = "") -> str:
    """The name of the format of what stands at ``path``: of several in one folder that is ``wanted``, if it is among them.

    Raises ``RecordError`` that says what could stand there.
    """
    if not os.path.exists(path):
        raise RecordError(f"{path}: there is no such file or folder")
    ending = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return _of_folder(path, wanted)
    if ending in (".json", ".jsonl", ".parquet", ".tar"):
        return ending[1:]
    if ending == ".txt":
        raise RecordError(
            f"{path}: a text file is one document, or one on each line, and does not say which; say it: "
            f"`{command(path, 'text_files')}` or `{command(path, 'text_lines')}`"
        )
    _refuse_packed(path)
    raise RecordError(f"{path}: none of the formats that are known:{_listed(FORMATS)}")


def command(path: str, format_name: str = "", media_dir: str = "", ignore_fields: tuple[str, ...] = ()) -> str:
    """The command that converts what stands at ``path``."""
    words = [shlex.quote(path), "--out", "FOLDER"]
    words += ["--format", format_name] if format_name else []
    words += ["--media-dir", shlex.quote(media_dir)] if media_dir else []
    words += ["--ignore-fields", *map(shlex.quote, ignore_fields)] if ignore_fields else []
    return " ".join([_COMMAND, *words])


def files_under(folder: str) -> Iterator[str]:
    """The files in ``folder`` and below it, by their paths from there, in order; names that begin with a dot do not count.

    Links to folders are followed, but for those that lead back to where they stand.
    """
    way: dict[str, tuple[str, ...]] = {folder: (os.path.realpath(folder),)}  # the folders above and at each place, without links
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        below = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not name.startswith(".")}
        folders[:] = sorted(name for name, real in below.items() if not _leads_back(real, way[place]))
        way |= {os.path.join(place, name): (*way[place], below[name]) for name in folders}
        del way[place]
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def _of_folder(path: str, wanted: str) -> str:
    if os.path.isdir(os.path.join(path, ".nv-meta")):
        return "energon"
    if os.path.isfile(os.path.join(path, "wids-meta.json")):
        return "wids"
    if any(os.path.isfile(os.path.join(path, name)) for name in METADATA):
        return "folder"
    names = list(files_under(path))
    for name in names:
        _refuse_packed(os.path.join(path, name))
    endings = {os.path.splitext(name)[1].lower() for name in names}
    tables = {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}
    if tables <= {name.removesuffix(".tar") for name in names if name.endswith(".tar")}:
        endings.discard(".parquet")  # img2dataset's notes about each shard
    found = [name for name in ("tar", "parquet") if f".{name}" in endings]
    if endings & MEDIA_ENDINGS:
        found.append("folder")
    if not found and ".txt" in endings:
        found.append("text_files")
    if wanted in found:
        return wanted
    if len(found) == 1:
        return found[0]
    if found:
        raise RecordError(
            f"{path}: holds files of several formats; name the files, or say with --format which it is:{_listed(found)}"
        )
    if endings & {".json", ".jsonl"}:
        raise RecordError(f"{path}: holds files of records; name each of them, not their folder")
    raise RecordError(f"{path}: holds no samples in a format that is known:{_listed(FORMATS)}")


def _listed(names: dict[str, str] | list[str]) -> str:
    return "".join(f"\n  {name}: {FORMATS[name]}" for name in names)


def _leads_back(real: str, way: tuple[str, ...]) -> bool:
    """Whether the folder ``real`` is one of ``way`` or holds one of them."""
    return any(os.path.join(place, "").startswith(os.path.join(real, "")) for place in way)


def _refuse_packed(path: str) -> None:
    if path.lower().endswith(PACKED):
        raise RecordError(f"{path}: packed files are not read; unpack it, or name other files or another folder")


def _raise(error: OSError) -> None:
    raise RecordError(f"{error.filename}: the folder cannot be read: {error.strerror}")

"""Opens sets for preparation: those that training reads in place, and those that are converted first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.containers.folder import open_folder
from megatron_vila.data.containers.parquet import ParquetFiles
from megatron_vila.data.containers.texts import TextFiles, TextLines
from megatron_vila.data.fields import RecordError
from megatron_vila.data.formats.detect import FORMATS, PREPARED, detect
from megatron_vila.data.sources.joined import Joined
from megatron_vila.data.sources.metadataset import ENDINGS
from megatron_vila.data.sources.open import open_records
from megatron_vila.data.sources.remote import is_address
from megatron_vila.data.sources.shards import Shards
from megatron_vila.data.sources.source import Source

_READERS: dict[str, Callable[[DataConfig, str], Source]] = {
    "parquet": ParquetFiles,
    "folder": open_folder,
    "text_files": TextFiles,
    "text_lines": TextLines,
    # Training reads tar files as well, but not those of a folder that holds more.
    "tar": Shards.of_tars,
}


def open_sets(data: DataConfig, paths: Sequence[str], format_name: str = "") -> Source:
    """The samples of ``paths``, one path after the other, by the settings ``data``.

    Each path has the format ``format_name``, or that which is found there; one that training reads must be what is found. Of the
    formats that only preparation reads, a sample is looked at when it is read, so ``bad`` names none of theirs. Raises
    ``RecordError``.
    """
    sources = [_open(data, path, format_name) for path in paths]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open(data: DataConfig, path: str, format_name: str) -> Source:
    if format_name and format_name not in FORMATS:
        raise RecordError(f"--format {format_name} is unknown; use one of {', '.join(FORMATS)}")
    if format_name in PREPARED:
        return _READERS[format_name](data, path)
    found = "energon" if path.endswith(ENDINGS) or is_address(path) else detect(path, format_name)
    if format_name not in ("", found):
        raise RecordError(
            f"{path}: has the format {found}, not --format {format_name}; leave --format out, or name a path of that format"
        )
    return _READERS[found](data, path) if found in _READERS else open_records(data, [path])

"""The files of one checkpoint: written with checksums, described by info.json, and read as plain files only.

info.json names every file with its size and the xxh3 checksum of each block of ``BLOCK`` bytes, and ends with a checksum of
itself. Blocks let many ranks share the check of one large file. The sums guard against damage and mixed-up files, not against
somebody who writes new sums: what is read is checked for its own sake (``tensors.py``).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig

from megatron_vila.checkpoint.folder import INFO, is_finished
from megatron_vila.checkpoint.io import open_plain, require_no_refusal
from megatron_vila.errors import CheckpointError, DamagedError, some

FORMAT = 1
STATE = "state.pt"
BLOCK = 1 << 28
"""Bytes of a file that share a checksum."""

UNCHECKED = "checkpoint %s was saved by a version without checksums: the content of its files is unchecked"

_ALGORITHM = "xxh3_64"
_CHUNK = 1 << 22
_THREADS = 4


@dataclass
class Written:
    """What a file holds: its size in bytes and the checksum of each of its blocks."""

    size: int = 0
    sums: list[str] = field(default_factory=list)


class _SummedFile:
    """A file to write to from begin to end that keeps the checksums of what passes."""

    def __init__(self, file: BinaryIO, written: Written) -> None:
        self._file, self._written = file, written
        self._hash = xxhash.xxh3_64()

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self._file.write(data)
        for begin, end in _cut(self._written.size, len(data)):
            self._hash.update(data[begin:end])
            self._written.size += end - begin
            if self._written.size % BLOCK == 0:
                self._next_block()
        return len(data)

    def tell(self) -> int:
        return self._written.size

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Note the last block and force the file to the disk."""
        if self._written.size % BLOCK:
            self._next_block()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _next_block(self) -> None:
        self._written.sums.append(self._hash.hexdigest())
        self._hash.reset()


@contextmanager
def summed_file(path: Path, written: Written) -> Iterator[_SummedFile]:
    """Write a new file; ``written`` is complete, and the file on the disk, when the block ends. Raises ``OSError``."""
    with open(path, "xb") as file:
        summed = _SummedFile(file, written)
        yield summed
        summed.finish()


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a small file."""
    written = Written()
    with summed_file(path, written) as file:
        file.write(data)
    return written


def write_rest(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    info: Mapping[str, Any],
    files: Mapping[str, Written],
    world_size: int,
) -> None:
    """Write what a checkpoint has beside its tensors (``files``), info.json last.

    ``state`` (plain values and tensors) goes into state.pt, ``info`` (JSON values) into info.json.
    """
    files = dict(files)
    for name, value in ((STATE, state), ("common.pt", {})):
        files[name] = Written()
        with summed_file(folder / name, files[name]) as file:
            torch.save(dict(value), file)  # type: ignore[arg-type]
    # Megatron-Core wants this one and common.pt.
    config = json.dumps(asdict(CheckpointingConfig("torch_dist")))
    files["metadata.json"] = write_bytes(folder / "metadata.json", config.encode())
    content = {
        "format": FORMAT,
        "step": step,
        **info,
        "world_size": world_size,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("megatron-vila", "megatron-core", "torch")},
        "files": {name: files[name].size for name in sorted(files)},
        "sums": {
            "algorithm": _ALGORITHM,
            "block_bytes": BLOCK,
            "files": {name: files[name].sums for name in sorted(files)},
        },
    }
    content["sum"] = sum_of(content)
    write_bytes(folder / INFO, json.dumps(content, indent=2).encode() + b"\n")


def read_info(folder: Path) -> dict[str, Any]:
    """The content of info.json. Raises ``DamagedError`` if it is not what ``write_rest`` or an earlier version wrote, and
    ``CheckpointError`` if it is of a version that this one cannot read, or cannot be read now."""
    try:
        with open_plain(folder / INFO) as file:
            info = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{INFO} is damaged: {error}") from error
    if not isinstance(info, dict) or type(info.get("format")) is not int:
        raise DamagedError(f"{INFO} is damaged: it holds no format")
    if info["format"] > FORMAT:
        raise CheckpointError(
            f"it has format {info['format']}, this version reads up to {FORMAT}; update megatron_vila"
        )
    files = info.get("files")
    if type(info.get("step")) is not int or info["step"] < 0 or not isinstance(files, dict):
        raise DamagedError(f"{INFO} is damaged: it holds no step or no files")
    wrong = [name for name, size in files.items() if not _is_plain_name(name) or type(size) is not int or size < 0]
    if wrong:
        raise DamagedError(f"{INFO} names files that no checkpoint has: {some(list(map(repr, wrong)))}; none was opened")
    if {"sum", "sums"} & info.keys() and info.pop("sum", None) != sum_of(info):
        raise DamagedError(f"{INFO} is damaged: it is not what was written")
    if is_summed(info):
        _require_sums(info)
    return info


def is_summed(info: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has checksums: early versions wrote none."""
    return "sums" in info


def wrong_files(folder: Path, info: Mapping[str, Any]) -> dict[str, str]:
    """Files of ``info`` that are not there as plain files of their size, and why. No content is read."""
    wrong = {}
    for name, size in info["files"].items():
        try:
            found = os.lstat(folder / name)
        except FileNotFoundError:
            wrong[name] = "missing or truncated files"
            continue
        if not stat.S_ISREG(found.st_mode):
            wrong[name] = "links, folders or devices in the place of plain files"
        elif found.st_size != size:
            wrong[name] = "missing or truncated files"
    return wrong


def check_files(folder: Path, info: Mapping[str, Any]) -> None:
    """Raise ``DamagedError`` if there are ``wrong_files``."""
    wrong = wrong_files(folder, info)
    kinds = {kind: [name for name in wrong if wrong[name] == kind] for kind in wrong.values()}
    if wrong:
        raise DamagedError("; ".join(f"{kind}: {some(names)}" for kind, names in kinds.items()))


def blocks_to_check(info: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(file, number of a block) of everything that has a checksum, in an order to deal out to ranks."""
    return [(name, block) for name, sums in info["sums"]["files"].items() for block in range(len(sums))]


def damage(folder: Path, info: Mapping[str, Any], blocks: Iterable[tuple[str, int]]) -> list[str]:
    """Read ``blocks`` and name those that are not what was written. Raises ``OSError`` if reading fails."""

    def check(place: tuple[str, int]) -> str | None:
        name, block = place
        begin, end = block * BLOCK, min((block + 1) * BLOCK, info["files"][name])
        if _sum_of_range(folder / name, begin, end) == info["sums"]["files"][name][block]:
            return None
        return f"{name} (bytes {begin} to {end})"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [text for text in pool.map(check, blocks) if text is not None]


def checked_info(folder: Path) -> dict[str, Any]:
    """``read_info`` of a checkpoint that has no ``wrong_files``. Raises what they and ``check_files`` raise."""
    info = read_info(folder)
    check_files(folder, info)
    return info


def check_alone(folder: Path) -> dict[str, Any]:
    """Check the files of a checkpoint, content included, in this process; returns info.json. Raises ``DamagedError``."""
    if not is_finished(folder):
        raise DamagedError(f"{INFO} is missing")
    info = checked_info(folder)
    if is_summed(info):
        raise_damage(damage(folder, info, blocks_to_check(info)))
    return info


def raise_damage(damaged: Sequence[str]) -> None:
    """Raise ``DamagedError`` if anything is named."""
    if damaged:
        raise DamagedError(f"damaged files, whose content is not what was written: {some(sorted(damaged))}")


def read_state(folder: Path) -> dict[str, Any]:
    """What state.pt holds: ``adam_step``, ``scheduler_steps``, ``extra``. Raises ``DamagedError``."""
    with open_plain(folder / STATE) as file:
        state = load_plain(file, STATE)
    kinds = {"adam_step": (int, type(None)), "scheduler_steps": (int, type(None)), "extra": (dict,)}
    if type(state) is not dict or any(type(state.get(name)) not in kind for name, kind in kinds.items()):
        raise DamagedError(f"{STATE} holds no {', '.join(kinds)}")
    negative = [name for name in ("adam_step", "scheduler_steps") if (state[name] or 0) < 0]
    if negative:
        raise DamagedError(f"{STATE} is damaged: {negative[0]} is {state[negative[0]]}")
    return state


def load_plain(file: BinaryIO, name: str) -> Any:
    """``torch.load`` of tensors and plain values only. Nothing that the file names is run.

    Raises ``DamagedError``, or ``CheckpointError`` if the system refuses (reading, memory).
    """
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        require_no_refusal(error, name)
        # Not torch's text: it tells how to load the file anyway, which nobody should do.
        kind = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:200]
        raise DamagedError(
            f"{name} holds more than tensors and plain values, or is damaged: {kind}; nothing of it was run"
        ) from error


def _sum_of_range(path: Path, begin: int, end: int) -> str:
    found = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(_CHUNK, max(end - begin, 1))))
    with open_plain(path) as file:
        file.seek(begin)
        while begin < end:
            count = file.readinto(buffer[: min(len(buffer), end - begin)])  # type: ignore[attr-defined]
            if not count:
                break
            found.update(buffer[:count])
            begin += count
    return found.hexdigest()


def sum_of(content: Mapping[str, Any]) -> str:
    """The checksum of values that JSON can hold, whatever the order of their names."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _cut(position: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of ``length`` bytes, written from ``position`` on, that lie in one block each."""
    begin = 0
    while begin < length:
        end = min(length, begin + BLOCK - (position + begin) % BLOCK)
        yield begin, end
        begin = end


def _require_sums(info: Mapping[str, Any]) -> None:
    """Raise ``DamagedError`` unless each file of ``info`` has one checksum of a kind that we know for each of its blocks."""
    sums = info["sums"]
    if not isinstance(sums, dict) or not isinstance(sums.get("files"), dict):
        raise DamagedError(f"{INFO} is damaged: its checksums name no files")
    if sums.get("algorithm") != _ALGORITHM or sums.get("block_bytes") != BLOCK:
        raise CheckpointError(f"{INFO} has checksums that this version does not know; update megatron_vila")
    files, of_files = info["files"], sums["files"]
    wrong = [name for name in files.keys() | of_files.keys() if not _has_sums(files.get(name), of_files.get(name))]
    if wrong:
        raise DamagedError(f"{INFO} is damaged: files without a checksum for each of their blocks: {some(sorted(wrong))}")


def _has_sums(size: int | None, sums: Any) -> bool:
    return size is not None and isinstance(sums, list) and len(sums) == -(-size // BLOCK)


def _is_plain_name(name: str) -> bool:
    is_name = name not in (".", "..") and 0 < len(name) < 256
    return is_name and name.isascii() and name.isprintable() and not set(name) & {"/", "\\"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

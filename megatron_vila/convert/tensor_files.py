"""Reads folders of safetensors files lazily, and writes such files from tensors that are made one by one.

Nothing here ever holds more than one tensor. A file is mapped into memory while one of its tensors is read. Pickled weights
are refused, because reading them could run code.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_vila.errors import some

SHARD_BYTES = 5 * 10**9
"""Largest file that is written, in bytes, if no single tensor is larger."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, which are known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class SourceTensor(Protocol):
    """A tensor of known dtype and shape that is read when it is needed."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, [``shape``] of ``dtype``."""


@dataclass(frozen=True)
class MemoryTensor(TensorInfo):
    """A tensor that is in memory already."""

    tensor: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> MemoryTensor:
        """``tensor`` with its dtype and shape."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor)

    def read(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True)
class FileTensor(TensorInfo):
    """The tensor ``name`` in the safetensors file ``file``."""

    file: Path
    name: str

    def read(self) -> torch.Tensor:
        """The tensor, mapped from its file. The file stays mapped as long as the tensor lives."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.name)


def find_tensors(folder: Path, problems: list[str]) -> dict[str, FileTensor]:
    """All tensors of the safetensors files in ``folder`` by name; nothing but their headers is read.

    Appends to ``problems``: no safetensors files, pickled weights in their place, damaged or truncated files, files that an index
    names but that are not there, tensors that are not in the file that an index names, and dtypes that weights do not have.
    """
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not files and not indices:
        problems.append(_nothing_in(folder))
        return {}
    found: dict[str, FileTensor] = {}
    damaged: set[str] = set()
    for path in files:
        if not path.is_file():
            damaged.add(path.name)
            problems.append(f"{path} is not a plain file; copy the file itself")
            continue
        try:
            _read_header(path, found, problems)
        except SafetensorError as error:
            damaged.add(path.name)
            problems.append(f"{path} is truncated or damaged ({error}); copy or download it again")
    for index in indices:
        _check_index(index, found, damaged, problems)
    return found


def _nothing_in(folder: Path) -> str:
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    if pickles:
        return (
            f"{folder} holds pickled weights only ({', '.join(pickles)}); they are refused, because reading them can run code "
            "hidden in them: save the model again with safetensors, where you trust its source"
        )
    return f"{folder} holds no *.safetensors file; give a folder with weights"


def _read_header(path: Path, found: dict[str, FileTensor], problems: list[str]) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            slice_ = file.get_slice(name)
            dtype = slice_.get_dtype()
            if dtype not in _DTYPES:
                problems.append(f"{path}: {name} has elements of type {dtype}; save weights as {', '.join(_DTYPES)}")
            elif name in found:
                problems.append(f"{name} is in {found[name].file.name} and in {path.name} of {path.parent}; remove one")
            else:
                found[name] = FileTensor(_DTYPES[dtype], tuple(slice_.get_shape()), path, name)


def _check_index(index: Path, found: Mapping[str, FileTensor], damaged: set[str], problems: list[str]) -> None:
    try:
        if not index.is_file():
            raise ValueError("it is not a plain file")
        places = json.loads(index.read_text())["weight_map"]
        wanted = sorted(set(places.values()) - damaged)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(
            f"{index} is not an index of safetensors files ({type(error).__name__}: {error}); copy or download it again"
        )
        return
    outside = [name for name in wanted if not isinstance(name, str) or Path(name).name != name]
    if outside:
        problems.append(
            f"{index} names files outside of its folder: {some(list(map(repr, outside)))}; none was opened, put them beside it"
        )
        return
    missing = [name for name in wanted if not (index.parent / name).is_file()]
    if missing:
        problems.append(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; copy or download them")
    readable = set(wanted) - set(missing)
    wrong = [n for n, file in places.items() if file in readable and (n not in found or found[n].file.name != file)]
    if wrong:
        problems.append(
            f"{index} names files that do not hold these tensors: {some(wrong)}; copy or download index and files together"
        )


def write_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``<stem>.safetensors``, or numbered files of at most ``shard_bytes`` with an index, in the order of ``tensors``.

    A file is larger only if it holds a single larger tensor. ``read`` returns each tensor by name when its turn comes, and it is
    converted to the dtype in ``tensors``. Files are flushed to the disk. Raises ``ValueError`` if ``read`` returns another shape
    than that in ``tensors``, ``OSError`` if writing fails.
    """
    shards = _plan_shards(tensors, shard_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, {tensor: tensors[tensor] for tensor in names}, read)
        places |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total = sum(_bytes(info) for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _plan_shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, info in tensors.items():
        if shards[-1] and used + _bytes(info) > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += _bytes(info)
    return shards


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + _bytes(info)
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The data begins at a multiple of 8, so that mapped tensors are aligned.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_file(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]) -> None:
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with open(path, "wb") as file:
        file.write(_header(ordered))
        for name, info in ordered.items():
            tensor = read(name)
            if tuple(tensor.shape) != info.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, but {list(info.shape)} was announced")
            file.write(tensor.to(info.dtype).contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())

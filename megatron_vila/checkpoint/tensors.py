"""The tensors of a checkpoint, in Megatron-Core's torch_dist format, written and read without collectives.

Each rank writes one file of pieces (``torch.save`` records one after another); ``.metadata``, written once all ranks are done,
says which pieces a tensor consists of and where they lie. A tensor is known by its global name and shape, a piece by its
offsets and sizes in it, so any layout reads what another one wrote. Megatron-Core and torch read these files as their own.

Both of them unpickle ``.metadata`` without restriction, and bytes entries of the tensor files too. Here ``.metadata`` is read
with nothing but a few plain classes allowed, what it says is checked entry by entry, and only tensors are read.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vila.checkpoint.files import Written, load_plain, summed_file, write_bytes
from megatron_vila.checkpoint.io import open_plain, require_no_refusal
from megatron_vila.errors import DamagedError

METADATA = ".metadata"
Place = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangular part of the tensor ``key`` of ``shape``, and the bytes of a file that hold it."""

    key: str
    dtype: torch.dtype
    shape: Place
    offsets: Place
    sizes: Place
    file: str
    begin: int
    length: int


@dataclass
class StoredTensor:
    """A tensor of a checkpoint; its pieces may come from many ranks."""

    dtype: torch.dtype
    shape: Place
    pieces: list[Piece] = field(default_factory=list)


class PieceWriter:
    """Writes one rank's file of pieces. ``pieces`` and ``files`` say what is in it; use as a context manager."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.pieces: list[Piece] = []
        self.files = {f"__{rank}_0.distcp": Written()}
        self._folder, self._open = folder, ExitStack()

    def __enter__(self) -> PieceWriter:
        ((name, written),) = self.files.items()
        self._stream = self._open.enter_context(summed_file(self._folder / name, written))
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, key: str, tensor: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Write ``tensor`` (of as many dimensions as ``shape``), which begins at ``offsets``. Raises ``OSError``."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            # A view would be written with the whole storage that it looks into.
            tensor = tensor.clone()
        begin = self._stream.tell()
        torch.save(tensor, self._stream)  # type: ignore[arg-type]
        (name,) = self.files
        length = self._stream.tell() - begin
        self.pieces.append(
            Piece(key, tensor.dtype, tuple(shape), tuple(offsets), tuple(tensor.shape), file=name, begin=begin, length=length)
        )


def write_metadata(folder: Path, pieces: Iterable[Piece]) -> Written:
    """Write ``.metadata`` for the pieces of all ranks. Raises ``ValueError`` if they are not exactly the whole tensors."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for piece in pieces:
        tensor = tensors.setdefault(
            piece.key, TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(piece.shape), [])
        )
        tensor.chunks.append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
        index = MetadataIndex(piece.key, piece.offsets)
        if index in places:
            raise ValueError(f"{piece.key}: its piece at {piece.offsets} was written twice")
        places[index] = _StorageInfo(piece.file, piece.begin, piece.length)
    for key, tensor in tensors.items():
        covered = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if covered != math.prod(tensor.size):
            raise ValueError(f"{key}: the ranks wrote {covered} elements of {math.prod(tensor.size)}")
    metadata = Metadata(dict(tensors), planner_data={}, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    return write_bytes(folder / METADATA, pickle.dumps(metadata))


class StoredTensors(Mapping[str, StoredTensor]):
    """The tensors of a checkpoint's folder by name. ``files`` are the sizes of its files, as info.json tells them.

    Raises ``DamagedError`` if ``.metadata`` holds anything but tensors, or a piece does not lie in a file of ``files``.
    """

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self._folder = folder
        self._tensors = _tensors_of(read_metadata(folder), files)

    def __getitem__(self, key: str) -> StoredTensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """The whole tensor, or place ``layer`` of its leading axis. Raises ``DamagedError``."""
        tensor = self[key]
        begin = [0] * len(tensor.shape) if layer is None else [layer, *[0] * (len(tensor.shape) - 1)]
        sizes = list(tensor.shape) if layer is None else [1, *tensor.shape[1:]]
        result = torch.empty(sizes, dtype=tensor.dtype)
        self.read_into([Target(key, result, begin)])
        return result if layer is None else result[0]

    def read_into(self, targets: Sequence[Target]) -> None:
        """Copy parts of tensors into ``targets``, file by file. Raises ``DamagedError`` if pieces do not cover a target."""
        reads = []
        for target in targets:
            parts = [(piece, part) for piece in self[target.key].pieces if (part := _overlap(target, piece)) is not None]
            covered, wanted = _covered([part for _, part in parts], target), _wanted(target, self[target.key].shape)
            if covered != wanted:
                raise DamagedError(f"the pieces of {target.key} cover {covered} of the {wanted} elements that are wanted")
            reads += [(piece, target, part) for piece, part in parts]
        reads.sort(key=lambda read: (read[0].file, read[0].begin))
        with ExitStack() as stack:
            name, last = "", None
            file: Any = None
            data: Any = None
            for piece, target, (low, high) in reads:
                if piece.file != name:
                    stack.close()
                    name, file = piece.file, stack.enter_context(open_plain(self._folder / piece.file))
                if piece is not last:
                    last, data = piece, _load(piece, file)
                to, source = _within(low, high, target.begin), _within(low, high, piece.offsets)
                target.tensor[to].copy_(data[source])


@dataclass(frozen=True)
class Target:
    """A tensor to fill with the part of ``key`` that begins at ``begin`` and has the tensor's shape.

    With ``may_miss`` places beyond the stored tensor keep what they hold.
    """

    key: str
    tensor: torch.Tensor
    begin: Sequence[int]
    may_miss: bool = False


def read_metadata(folder: Path) -> Any:
    """torch's ``Metadata`` of a checkpoint, read with nothing but the plain classes of ``ALLOWED``.

    Raises ``DamagedError`` for anything else in it, before it is run.
    """
    with open_plain(folder / METADATA) as file:
        try:
            return _MetadataUnpickler(file).load()
        except DamagedError:
            raise
        except Exception as error:
            require_no_refusal(error, METADATA)
            raise DamagedError(f"{METADATA} is damaged: {type(error).__name__}: {error}") from error


def _tensors_of(metadata: Any, files: Mapping[str, int]) -> dict[str, StoredTensor]:
    """The entries of ``metadata`` in our own types, each checked; whatever else hangs on them is left behind."""
    entries, places = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if type(metadata) is not Metadata or type(entries) is not dict or type(places) is not dict:
        raise DamagedError(f"{METADATA} is not the metadata of a checkpoint")
    where = {}
    for index, place in places.items():
        if type(index) is not MetadataIndex:
            raise DamagedError(f"{METADATA} names a place of {type(index).__name__}, not of a tensor")
        key, offsets = getattr(index, "fqn", None), _place(getattr(index, "offset", None))
        if type(key) is not str:
            raise DamagedError(f"{METADATA} names a place of no tensor")
        where[key, offsets] = _bytes_of(key, place, files)
    tensors = {}
    for key, entry in entries.items():
        if type(key) is not str or type(entry) is not TensorStorageMetadata:
            raise DamagedError(f"{METADATA}: {key!r} is {type(entry).__name__}; a checkpoint of ours holds tensors only")
        dtype = getattr(getattr(entry, "properties", None), "dtype", None)
        shape, chunks = _place(getattr(entry, "size", None)), getattr(entry, "chunks", None)
        if type(dtype) is not torch.dtype or shape is None or type(chunks) is not list:
            raise DamagedError(f"{METADATA}: {key!r} has no dtype, no shape or no pieces")
        tensors[key] = StoredTensor(dtype, shape)
        for chunk in chunks:
            offsets, sizes = _place(getattr(chunk, "offsets", None)), _place(getattr(chunk, "sizes", None))
            if offsets is None or sizes is None or (key, offsets) not in where or not _lies_in(offsets, sizes, shape):
                raise DamagedError(f"{METADATA}: a piece of {key!r} at {offsets} of size {sizes} has no place or no room")
            piece = Piece(key, dtype, shape, offsets, sizes, *where[key, offsets])
            if piece.length < math.prod(sizes) * dtype.itemsize:
                raise DamagedError(f"{METADATA}: {piece.length} bytes are too few for a piece of {key!r} of size {sizes}")
            tensors[key].pieces.append(piece)
        held = sum(math.prod(piece.sizes) for piece in tensors[key].pieces)
        if held != math.prod(shape):
            raise DamagedError(f"{METADATA}: the pieces of {key!r} hold {held} of its {math.prod(shape)} elements")
    return tensors


def _bytes_of(key: Any, place: Any, files: Mapping[str, int]) -> tuple[str, int, int]:
    """File, first byte and length of a piece, all of it inside one of ``files``."""
    file, begin, length = (getattr(place, name, None) for name in ("relative_path", "offset", "length"))
    if type(place) is not _StorageInfo or type(file) is not str or file not in files:
        raise DamagedError(f"{METADATA}: {key!r} lies in {file!r}, which is not a file of this checkpoint; it was not opened")
    if getattr(place, "transform_descriptors", None):
        raise DamagedError(f"{METADATA}: {key!r} is transformed, which no checkpoint of ours is")
    if type(begin) is not int or type(length) is not int or begin < 0 or length < 0 or begin + length > files[file]:
        raise DamagedError(f"{METADATA}: {key!r} lies at bytes {begin} to {begin}+{length} of {file}, which has {files[file]}")
    return file, begin, length


def _place(value: Any) -> Place | None:
    numbers = tuple(value) if isinstance(value, torch.Size) else None
    return numbers if numbers is None or all(number >= 0 for number in numbers) else None


def _lies_in(offsets: Place | None, sizes: Place | None, shape: Place) -> bool:
    if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
        return False
    return all(o + s <= whole for o, s, whole in zip(offsets, sizes, shape, strict=True))


def _overlap(target: Target, piece: Piece) -> tuple[list[int], list[int]] | None:
    """First and last place, in the whole tensor, that both have; None if there is none."""
    low = [max(a, b) for a, b in zip(target.begin, piece.offsets, strict=True)]
    ends = ((b + t, o + s) for b, t, o, s in zip(target.begin, target.tensor.shape, piece.offsets, piece.sizes, strict=True))
    high = [min(end) for end in ends]
    return None if any(a >= b for a, b in zip(low, high, strict=True)) else (low, high)


def _wanted(target: Target, shape: Place) -> int:
    """How many elements of ``target`` the tensor of ``shape`` must give."""
    if not target.may_miss:
        return target.tensor.numel()
    ends = zip(target.begin, target.tensor.shape, shape, strict=True)
    return math.prod(max(0, min(begin + size, whole) - begin) for begin, size, whole in ends)


def _covered(parts: Sequence[tuple[list[int], list[int]]], target: Target) -> int:
    """How many elements of ``target`` lie in ``parts``, each counted once: two pieces that overlap must not hide a hole.

    The parts' edges cut the target into cells, never more of them than it has elements.
    """
    if not parts:
        return 0
    cuts = [_within(low, high, target.begin) for low, high in parts]
    edges = [sorted({edge for cut in axis for edge in (cut.start, cut.stop)}) for axis in zip(*cuts, strict=True)]
    number = [{edge: index for index, edge in enumerate(axis)} for axis in edges]
    cells = np.zeros([len(axis) - 1 for axis in edges], dtype=bool)
    for cut in cuts:
        cells[tuple(slice(of[one.start], of[one.stop]) for one, of in zip(cut, number, strict=True))] = True
    for axis in reversed(edges):
        cells = cells @ np.diff(axis)
    return int(cells)


def _within(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _load(piece: Piece, file: BinaryIO) -> torch.Tensor:
    view: Any = _create_file_view(cast(Any, file), piece.begin, piece.length)
    tensor = load_plain(view, f"{piece.key} in {piece.file}")
    is_plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_plain or tuple(tensor.shape) != piece.sizes or tensor.dtype != piece.dtype:
        raise DamagedError(f"{piece.file} holds something else in the place of {piece.key} at {piece.offsets}")
    return tensor


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise DamagedError(f"{METADATA} refers to {module}.{name}, which no checkpoint of ours holds; it was not run")


_DCP = "torch.distributed.checkpoint."
ALLOWED = {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    # Where earlier versions of this package kept the path of the folder.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""All that ``.metadata`` may name, beside element types."""


def _member(kind: Any, name: Any) -> Any:
    """What stands in for ``getattr``, by which early releases of Python 3.11 pickle the members of an enumeration."""
    if kind is not _MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise DamagedError(f"{METADATA} takes {name} of {kind}, which no checkpoint of ours does; it was not run")
    return kind[name]

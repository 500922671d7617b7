"""torch_dist files of Megatron-Core, read and written tensor by tensor in one process without a process group.

The writer is torch's own, given a plan that makes each tensor when its turn comes; the reader follows the metadata to the
pieces that a tensor was saved in, whichever layout saved them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vila.checkpoint.tensor_files import TensorInfo
from megatron_vila.training.checkpoint_io import read_metadata


@dataclass(frozen=True)
class Piece:
    """A tensor to write: the whole of ``key``, or place ``layer`` of its leading axis of ``layers``; ``make`` gives it."""

    key: str
    info: TensorInfo
    layer: int | None
    layers: int
    make: Callable[[], torch.Tensor]


def write_pieces(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write ``pieces`` into the folder as one rank of Megatron-Core would; memory is that of the largest few tensors.

    Files are flushed to the disk. Raises ``OSError`` (wrapped by torch in ``CheckpointException``) if writing fails.
    """
    # Without copies ahead torch asks for a tensor only after it has written the last one, with GPUs too.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        # torch tells that there is no process group; there is to be none.
        warnings.simplefilter("ignore", UserWarning)
        dcp.save({}, storage_writer=writer, planner=_LazyPlanner(pieces), no_dist=True)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


class StoredTensors:
    """The tensors of a distributed checkpoint's folder. ``infos`` has their dtypes and whole shapes by key.

    Raises ``CheckpointError`` if the metadata holds anything but metadata.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = read_metadata(folder)
        self._places = metadata.storage_data
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                self._chunks[key] = stored.chunks
                self.infos[key] = TensorInfo(stored.properties.dtype, tuple(stored.size))

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """The whole tensor, or place ``layer`` of its leading axis, put together from the pieces of all ranks.

        Raises ``ValueError`` if the pieces do not cover it.
        """
        info = self.infos[key]
        begin = [0] * len(info.shape) if layer is None else [layer, *[0] * (len(info.shape) - 1)]
        end = list(info.shape) if layer is None else [layer + 1, *info.shape[1:]]
        result = torch.empty([e - b for b, e in zip(begin, end, strict=True)], dtype=info.dtype)
        covered = 0
        for chunk in self._chunks[key]:
            low = [max(b, o) for b, o in zip(begin, chunk.offsets, strict=True)]
            high = [min(e, o + s) for e, o, s in zip(end, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            to = result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))]
            piece = self._load(key, chunk)
            to.copy_(piece[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))])
            covered += to.numel()
        if covered != result.numel():
            raise ValueError(f"{self._folder}: the pieces of {key} cover {covered} of its {result.numel()} elements")
        return result if layer is None else result[0]

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places[MetadataIndex(key, chunk.offsets)]
        with open(self._folder / place.relative_path, "rb") as file:
            return torch.load(
                _create_file_view(file, place.offset, place.length), weights_only=True, map_location="cpu"
            )


class _LazyPlanner(SavePlanner):
    """A plan of one process whose tensors do not exist yet."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(piece.key, piece.layer): piece for piece in pieces}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Everything is known from the start."""

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        place = write_item.tensor_data
        key = write_item.index.fqn
        stacked = (key, None) not in self._pieces
        piece = self._pieces[key, place.chunk.offsets[0] if stacked else None]
        tensor = piece.make().to(piece.info.dtype).contiguous()
        # A view would be written with the whole storage that it looks into.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        if tuple(tensor.shape) != piece.info.shape:
            raise ValueError(f"{key} has shape {list(tensor.shape)}, planned was {list(piece.info.shape)}")
        return tensor.unsqueeze(0) if stacked else tensor


def _item(piece: Piece) -> WriteItem:
    shape = piece.info.shape
    size, offsets, sizes = shape, (0,) * len(shape), shape
    if piece.layer is not None:
        size, offsets, sizes = (piece.layers, *shape), (piece.layer, *offsets), (1, *shape)
    place = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    return WriteItem(
        index=MetadataIndex(piece.key, torch.Size(offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(place, TensorProperties(dtype=piece.info.dtype), torch.Size(size)),
    )

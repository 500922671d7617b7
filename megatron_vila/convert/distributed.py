"""Writes a distributed checkpoint in one process, without a process group, one tensor at a time: the last step of an import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vila.checkpoint.files import write_rest
from megatron_vila.checkpoint.tensors import METADATA, PieceWriter, write_metadata
from megatron_vila.convert.tensor_files import TensorInfo


@dataclass(frozen=True)
class Part:
    """A tensor to write.

    It is the whole of the checkpoint's tensor ``key`` if ``layer`` is None. Otherwise ``key`` has ``layers`` places on a
    leading axis, and this is the one at index ``layer``. ``info`` is its dtype and its shape (without that axis); ``make``
    returns the tensor and is called when its turn comes.
    """

    key: str
    info: TensorInfo
    layer: int | None
    layers: int
    make: Callable[[], torch.Tensor]


def write_checkpoint(folder: Path, parts: Sequence[Part], info: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write the weights ``parts`` as the checkpoint of step 0 into the new ``folder``, as one rank of a run would.

    ``info`` are JSON values for info.json. ``extra`` are plain values, stored where a run stores its own extra state. One tensor
    is in memory at a time. Raises ``OSError`` if writing fails and ``ValueError`` if a tensor has another shape than its info.
    """
    with PieceWriter(folder, rank=0) as writer:
        for part in parts:
            tensor = part.make().to(part.info.dtype)
            if tuple(tensor.shape) != part.info.shape:
                raise ValueError(f"{part.key} has shape {list(tensor.shape)}, but {list(part.info.shape)} was planned")
            origin = (0,) * tensor.dim()
            if part.layer is None:
                writer.add(part.key, tensor, tensor.shape, origin)
            else:
                writer.add(part.key, tensor.unsqueeze(0), (part.layers, *tensor.shape), (part.layer, *origin))
    state = {"adam_step": None, "scheduler_steps": None, "extra": dict(extra)}
    files = writer.files | {METADATA: write_metadata(folder, writer.pieces)}
    write_rest(folder, 0, state, info, files, world_size=1)

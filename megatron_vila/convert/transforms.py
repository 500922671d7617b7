"""How Hugging Face tensors become one tensor of Megatron's layout, and back.

Legend: R rows of a tensor (I further dimensions unchanged), G key/value heads (Megatron's query groups).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_vila.plan.sizes import padded_vocab_size

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """``join`` makes one tensor of several. ``split`` makes them of it again, given the rows of each. ``shape`` is the shape
    that ``join`` gives; ``pads`` says that a checkpoint may hold more rows than that. ``name`` describes it in the weight map.

    ``join`` and ``split`` take the number of key/value heads last. They change only the first dimension, so the transform of a
    weight also suits its bias and the output factor of its low-rank update.
    """

    name: str
    join: Callable[[Sequence[torch.Tensor], int], torch.Tensor]
    split: Callable[[torch.Tensor, Sequence[int], int], list[torch.Tensor]]
    shape: Callable[[Sequence[Shape]], Shape]
    pads: bool = False


def _sum_of_rows(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _fuse(tensors_RI: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Group by group: the group's query heads, its key head, its value head."""
    return torch.cat([t_RI.view(groups, -1, *t_RI.shape[1:]) for t_RI in tensors_RI], 1).flatten(0, 1)


def _unfuse(fused_RI: torch.Tensor, rows: Sequence[int], groups: int) -> list[torch.Tensor]:
    fused_GRI = fused_RI.unflatten(0, (groups, -1))
    return [part_GRI.flatten(0, 1) for part_GRI in fused_GRI.split([r // groups for r in rows], 1)]


def _pad(tensors_RI: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    (table_RI,) = tensors_RI
    missing = padded_vocab_size(len(table_RI), tp=1) - len(table_RI)
    return torch.cat([table_RI, table_RI.new_zeros(missing, *table_RI.shape[1:])]) if missing else table_RI


COPY = Transform(
    "as it is",
    lambda tensors_RI, groups: tensors_RI[0],
    lambda tensor_RI, rows, groups: [tensor_RI],
    lambda shapes: shapes[0],
)
STACK_ROWS = Transform(
    "rows of the first, then of the second",
    lambda tensors_RI, groups: torch.cat(list(tensors_RI)),
    lambda tensor_RI, rows, groups: list(tensor_RI.split(list(rows))),
    _sum_of_rows,
)
FUSE_QKV = Transform("for each key/value head: its queries, its key, its value", _fuse, _unfuse, _sum_of_rows)
PAD_ROWS = Transform(
    "rows of zeros added up to a multiple of 64, cut off again",
    _pad,
    lambda table_RI, rows, groups: [table_RI[: rows[0]]],
    lambda shapes: (padded_vocab_size(shapes[0][0], tp=1), *shapes[0][1:]),
    pads=True,
)

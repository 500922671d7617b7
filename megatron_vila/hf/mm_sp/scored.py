"""Log-probabilities of all tokens of TRL's batches under MM-SP, for losses that need them whole, such as DPO.

TRL calls a model with a padded batch on which it has put its output layer (``fused_lm_head``), and gets one number for each
token. Here each rank scores its own tokens, and the numbers, not the logits, are put together on all ranks of a replica.

Legend: B rows of a batch, L tokens of the longest, s local tokens of the packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.accelerator import to_device
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.plan.row import IGNORE

SCORED = "mm_sp_scored"
"""Key of such a batch; the model takes it as a keyword."""

_FIELDS = ("input_ids", "attention_mask", "completion_mask")


class ScoredRows:
    """This rank's share of a batch [B, L], and where its tokens belong.

    ``shard`` is what the collator of MM-SP makes of the rows. ``places`` int64 [s] has the place of each local token among the
    B * (L - 1) scored ones, or B * (L - 1) for padding and last tokens, which have no next one.
    """

    def __init__(self, shard: dict[str, Any], places: torch.Tensor, rows: int, length: int) -> None:
        self.shard, self._places, self._rows, self._length = shard, places, rows, length

    def arguments(self) -> dict[str, Any]:
        """What the model is called with instead: the labels are shifted already."""
        call = dict(self.shard)
        return {"shift_labels": call.pop("labels"), "fused_lm_head": True, **call}

    def whole(self, output: Any, sample: dist.ProcessGroup) -> Any:
        """The output for the whole batch, its tensors [B, L - 1], equal on all ranks of ``sample``. An all-reduce for each.

        The gradient is scaled so that the average of all ranks' is that of the mean of the replicas' losses."""
        fields = {name: self._put(value, sample) for name, value in output.items() if name not in ("loss", "aux_loss")}
        return type(output)(**fields)

    def _put(self, value_1s: torch.Tensor, sample: dist.ProcessGroup) -> torch.Tensor:
        numbers_s = value_1s[0].to(torch.float32) if value_1s.dtype == torch.bool else value_1s[0]
        scored = self._rows * (self._length - 1)
        whole = numbers_s.new_zeros(scored + 1).index_copy(0, to_device(self._places, numbers_s.device), numbers_s)
        whole = _SumOverReplica.apply(whole[:scored].view(self._rows, -1), sample)
        return whole.to(value_1s.dtype)


class _SumOverReplica(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.size = group.size()
        values = values.contiguous().clone()
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.size, None


@dataclass(frozen=True)
class ScoreCollator:
    """``collate_fn``: the batch of TRL's collator ``stock``, and beside it this rank's share of its rows. Raises ``ValueError``
    for batches with pictures."""

    stock: Callable[[list], Mapping[str, Any]]
    shard: ShardCollator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = dict(self.stock(list(samples)))
        if others := sorted(set(batch) - set(_FIELDS)):
            raise ValueError(
                f"MM-SP cannot share {', '.join(others)} of {type(self.stock).__name__}; give preferences of texts, and leave "
                "precompute_ref_log_probs out"
            )
        ids, mask, learned = (np.asarray(batch[name]) for name in _FIELDS)
        kept = [np.flatnonzero(row) for row in mask]
        labels = np.where(learned != 0, ids, IGNORE)
        documents = [{"input_ids": ids[b, k], "labels": labels[b, k]} for b, k in enumerate(kept)]
        shard = self.shard(documents)
        places = torch.from_numpy(_places(shard["mm_sp_row"], kept, ids.shape[1]))
        return batch | {SCORED: ScoredRows(shard, places, *ids.shape)}


def _places(row: Any, kept: Sequence[np.ndarray], length: int) -> np.ndarray:
    """``places`` of ``ScoredRows``; ``kept`` are the columns of each row's tokens."""
    nowhere = len(kept) * (length - 1)
    documents = np.searchsorted(row.cu_seqlens, row.positions, side="right") - 1
    places = np.full(len(row.positions), nowhere, dtype=np.int64)
    for number, columns in enumerate(kept):
        local = np.flatnonzero(documents == number)
        offsets = row.positions[local] - row.cu_seqlens[number]
        local, offsets = local[offsets < len(columns) - 1], offsets[offsets < len(columns) - 1]
        places[local] = number * (length - 1) + columns[offsets]
    return places

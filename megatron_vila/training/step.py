"""One pass of Megatron's pipeline schedule over the micro-batches of a step, and what comes out of it.

A micro-batch is one packed row. The loss of a micro-batch is the sum over the supervised tokens of this CP rank together
with their number; Megatron divides gradients by the number of the whole global batch (dp, cp and micro-batches).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vila.config.schema import LanguageConfig
from megatron_vila.data.rows import LoadedRow
from megatron_vila.models.shard import RowShard
from megatron_vila.models.vision.tower import FrameEncoder
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row_plan import ShardPlan


class Pass:
    """Runs rows through the model: ``run(rows)`` trains, ``run(rows, forward_only=True)`` evaluates.

    Rows come with their plan and with pixels on the host, which the tower copies to the device a few at a time.
    """

    def __init__(self, model: DistributedDataParallel, topology: ParallelTopology, llm: LanguageConfig) -> None:
        self.model, self.topology, self._llm = model, topology, llm
        self._vila = vila = model.module
        self.device, self._dtype = next(vila.parameters()).device, vila.config.params_dtype
        self._frames = FrameEncoder(vila.vision, vila.projector) if topology.is_first_stage else None

    def run(self, rows: Sequence[LoadedRow], forward_only: bool = False) -> list[RowReport]:
        """A report of each row on the last pipeline stage, an empty list on the others.

        Collectives: all of the model's, pipeline point-to-point, and with gradients Megatron's reduction over dp x cp.
        """
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=zip(rows, (*rows[1:], None), strict=True),
            model=[self.model],
            num_microbatches=len(rows),
            seq_length=max(r.row.length for r in rows),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _forward_step(self, rows: Iterator[tuple[LoadedRow, LoadedRow | None]], _: torch.nn.Module):
        """Megatron's step function: a row through this stage. While its layers run, the next row's frames are encoded."""
        loaded, following = next(rows)
        shard = RowShard.of(loaded.plan, self.topology, self._llm, self._dtype, self.device)
        made_NH = None if self._frames is None else self._frames(loaded.pixels).flatten(0, 1)
        hidden_t1H = self._vila.hidden(shard, made_NH)
        if self._frames is not None and following is not None:
            self._frames.start(following.pixels)
        if not self.topology.is_last_stage:
            return hidden_t1H, None
        output = self._vila.loss(hidden_t1H, shard)
        return output.loss_sum, partial(_loss, loaded.plan, output.correct_n)


class RowReport(NamedTuple):
    """What came of a row on a rank of the last pipeline stage.

    ``loss_sum`` [] and the number ``supervised`` of tokens are those of its CP rank. ``correct_n`` bool [n] says for each
    supervised token held here whether it was predicted, ``documents_n`` int64 [n] (host) to which of the row's ``documents`` it
    belongs.
    """

    loss_sum: torch.Tensor
    supervised: int
    correct_n: torch.Tensor
    documents_n: np.ndarray
    documents: int


def _loss(plan: ShardPlan, correct_n: torch.Tensor, loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, RowReport]:
    """Megatron's loss function: (sum, number of tokens, report); nothing is averaged here."""
    supervised = sum(plan.counts)
    report = RowReport(loss_sum.detach(), supervised, correct_n, plan.documents, len(plan.row.lengths))
    return loss_sum, torch.tensor(supervised, dtype=torch.int, device=loss_sum.device), report


def mean_loss(reports: Sequence[RowReport], topology: ParallelTopology, device: torch.device) -> tuple[float, int]:
    """Mean loss per supervised token of the global batch, and the number of these tokens, on every rank; (0.0, 0) without any.

    All-reduce over dp x cp on the last pipeline stage, then a broadcast over the pipeline group.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for report in reports:
        total += torch.stack([report.loss_sum.double(), torch.tensor(report.supervised, device=device).double()])
    if topology.is_last_stage:
        dist.all_reduce(total, group=topology.dp_cp)
    if topology.grid.pp > 1:
        dist.broadcast(total, group=topology.pp, group_src=topology.grid.pp - 1)
    loss, tokens = total.tolist()
    return (loss / tokens if tokens else 0.0), int(tokens)


def exact_matches(reports: Sequence[RowReport], topology: ParallelTopology, device: torch.device) -> list[bool | None]:
    """Whether every supervised token of a document was predicted (arg-max), for each document of the reports' rows in order.

    None for a document without supervised tokens.

    Called on the last pipeline stage. All-reduce over cp, then over tp under sequence parallelism.
    """
    wrong, seen = [], []
    for report in reports:
        missed = ~report.correct_n.cpu().numpy()
        wrong += np.bincount(report.documents_n[missed], minlength=report.documents).tolist()
        seen += np.bincount(report.documents_n, minlength=report.documents).tolist()
    counts = torch.tensor([wrong, seen], device=device)
    dist.all_reduce(counts, group=topology.cp)
    if topology.grid.tp > 1:
        dist.all_reduce(counts, group=topology.tp)
    return [w == 0 if s else None for w, s in zip(*counts.tolist(), strict=True)]

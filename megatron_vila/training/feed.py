"""The rows of a run: data set, order and loader put together for one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.lengths import length_table
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import RowOrder
from megatron_vila.data.sources.source import Source, report_bad_records
from megatron_vila.errors import ConfigError
from megatron_vila.host_memory import cores_of_rank, most_bytes, ranks_here
from megatron_vila.parallel.agreement import gathered, on_rank_zero
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB

JUDGED_FROM = 500
"""Samples from which on the share of broken ones is judged by data.max_broken."""


def training_loader(config: Config, topology: ParallelTopology, dataset: VilaDataset) -> tuple[RowLoader, int]:
    """The training rows of this rank from ``dataset``, and the rows of an epoch. With packing, rank 0 measures the samples and
    broadcasts their lengths to all ranks, or what is wrong, which all of them raise then (``UserError``).

    Raises ``ConfigError`` if so many records are bad that the run would end by data.max_broken anyway."""
    bad, samples = len(dataset.records.bad), len(dataset)
    if samples >= JUDGED_FROM and bad > config.data.max_broken * samples:
        raise ConfigError(
            f"{report_bad_records(dataset.records.bad, samples)}\nthat is more than data.max_broken={config.data.max_broken} "
            "allows; mend them, or raise it"
        )
    lengths = None
    if config.data.packing:
        # One rank measures for all: tables made by several could differ where their copies of the files do.
        cache = str(Path(config.train.output) / "lengths.json")
        lengths = on_rank_zero(lambda: length_table(dataset, cache, config.data.workers or cores_of_rank()))
    order = RowOrder(len(dataset), config.train.seed, config.data.shuffle, lengths, config.train.seq_length)
    return _loader(config, topology, dataset, order, config.train.global_batch_size), order.rows_of_epoch(0)


def evaluation_loader(config: Config, topology: ParallelTopology, held_out: VilaDataset) -> RowLoader:
    """The samples of ``held_out``, one per row in their order; a step is one row on each replica. A sample that cannot be used is
    left out."""
    order = RowOrder(len(held_out), config.train.seed, shuffle=False)
    return _loader(config, topology, held_out, order, topology.grid.dp, replace_bad=False)


def chance_level(records: Source, indices: Iterable[int]) -> float:
    """Accuracy of always giving the most frequent answers of the records ``indices``; all answers of a record, taken together,
    count as one, and records without an answer do not count."""
    answers = Counter(
        tuple(turn.text for turn in records.record(index).turns if turn.role == "assistant") for index in indices
    )
    del answers[()]
    return max(answers.values(), default=0) / max(answers.total(), 1)


def agreement(group: dist.ProcessGroup) -> Callable[[list[str]], list[str]]:
    """``agree`` of the loader over a CPU group: an all-reduce of the number of reports, and only if there are any an
    all-gather of them."""

    def agree(reports: list[str]) -> list[str]:
        count = torch.tensor(len(reports))
        dist.all_reduce(count, group=group)
        if not count:
            return []
        return sorted({report for part in gathered(reports, group) for report in part})

    return agree


def _loader(
    config: Config,
    topology: ParallelTopology,
    dataset: VilaDataset,
    order: RowOrder,
    batch: int,
    replace_bad: bool = True,
) -> RowLoader:
    data = config.data
    share = most_bytes() // ranks_here()
    return RowLoader(
        dataset,
        order,
        topology.grid,
        topology.rank,
        global_batch_size=batch,
        agree=agreement(topology.block_cpu),
        image_size=config.model.vision.image_size,
        aspect=data.image_aspect,
        workers=data.workers or cores_of_rank(),
        prefetch=data.prefetch,
        budget_bytes=int(data.host_memory_gib * GIB) or share // 4,
        video_decoder=data.video_decoder,
        replace_bad=replace_bad,
    )

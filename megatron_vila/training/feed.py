"""The rows of a run: data set, order and loader put together for one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config
from megatron_vila.data.cards import Cards
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.held_out import HeldOutLoader
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import SampleOrder
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.sources.open import Blend
from megatron_vila.data.sources.source import Source, report_bad_records
from megatron_vila.data.stream import Stream, StreamState
from megatron_vila.errors import ConfigError
from megatron_vila.host_memory import cores_of_rank
from megatron_vila.parallel.agreement import gathered
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.flops import flop_prices
from megatron_vila.plan.pictures import row_vision
from megatron_vila.training.run_data import RunData

JUDGED_FROM = 500
"""Number of samples from which the share of broken ones is compared with data.max_broken."""


def training_loader(config: Config, topology: ParallelTopology, data: RunData, state: StreamState) -> RowLoader:
    """The training rows of this rank from ``data``, continued from ``state``.

    Raises ``ConfigError`` if so many records are bad that the run would end by data.max_broken anyway."""
    dataset = data.train
    bad, samples = len(dataset.records.bad), len(dataset)
    if samples >= JUDGED_FROM and bad > config.data.max_broken * samples:
        raise ConfigError(
            f"{report_bad_records(dataset.records.bad, samples)}\nthat is more than data.max_broken={config.data.max_broken} "
            "allows; mend them, or raise it"
        )
    return RowLoader(
        dataset,
        open_stream(config, dataset, data.blend),
        state,
        topology.grid,
        topology.rank,
        _decoder(config, dataset),
        exchange=GroupExchange(topology.world_cpu),
        workers=config.data.workers or cores_of_rank(),
        prefetch=config.data.prefetch,
    )


def open_stream(config: Config, dataset: VilaDataset, blend: Blend) -> Stream:
    """What plans the steps of a run over the samples of ``dataset``, mixed by ``blend``."""
    return Stream(
        SampleOrder(blend.sizes, config.train.seed, config.data.shuffle, blend.weights),
        Cards(len(dataset)),
        flop_prices(config.model, config.optim, pictures=True),
        rows=config.train.global_batch_size,
        packing=config.data.packing,
        seq_length=config.train.seq_length,
        vision_capacity=row_vision(dataset.pictures, config.train.seq_length),
    )


def evaluation_loader(config: Config, topology: ParallelTopology, held_out: VilaDataset) -> HeldOutLoader:
    """The samples of ``held_out`` in their order, one for each row; a step is one row on each replica.

    A sample that cannot be used is left out.
    """
    return HeldOutLoader(
        held_out,
        topology.grid,
        topology.rank,
        _decoder(config, held_out),
        agree=GroupExchange(topology.block_cpu).agree,
        prefetch=config.data.prefetch,
    )


def _decoder(config: Config, dataset: VilaDataset) -> RowDecoder:
    return RowDecoder.of(config.data, config.model.vision.image_size, dataset.probe, dataset.failures)


def chance_level(records: Source, indices: Iterable[int]) -> float:
    """Accuracy, 0 to 1, of always giving the most frequent answers of the records ``indices``.

    All answers of a record together count as one, and records without an answer do not count.
    """
    answers = Counter(
        tuple(turn.text for turn in records.record(index).turns if turn.role == "assistant") for index in indices
    )
    del answers[()]
    return max(answers.values(), default=0) / max(answers.total(), 1)


class GroupExchange:
    """The ``Exchange`` of the ranks of a CPU group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.ranks = dist.get_rank(group), group.size()

    def agree(self, reports: list[str]) -> list[str]:
        """An all-reduce of the number of reports, and only if there are any an all-gather of them."""
        count = torch.tensor(len(reports))
        dist.all_reduce(count, group=self._group)
        if not count:
            return []
        return sorted({report for part in gathered(reports, self._group) for report in part})

    def gather(self, part: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(np.ascontiguousarray(part))
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own, group=self._group)
        return torch.stack(parts).numpy()

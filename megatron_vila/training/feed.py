"""The data side of a run: records, tokenizer, order and loader put together for one rank."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.config.load import ConfigError
from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.lengths import length_table
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import RowOrder
from megatron_vila.data.records import RecordError, RecordFiles
from megatron_vila.data.tokenizer import load_tokenizer
from megatron_vila.models.shard import local_frames
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.training.agreement import from_rank_zero

SHOWN_FILES = 4
"""most missing files that are named"""


def open_dataset(config: Config, files: Sequence[str]) -> VilaDataset:
    """The samples of ``files`` as documents. Reads text only. Raises ``ConfigError`` that names file, place and cure."""
    try:
        records = RecordFiles(files, config.data.media_dir, config.data.media_format)
        tokenizer = load_tokenizer(config.data.tokenizer)
        return VilaDataset(records, tokenizer, config.data, config.model, config.train.seq_length)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error


def training_loader(config: Config, topology: ParallelTopology) -> tuple[RowLoader, int]:
    """The training rows of this rank, and the rows of an epoch. With packing, rank 0 measures the samples and broadcasts
    their lengths to all ranks, or what is wrong, which all of them raise then (``UserError``)."""
    dataset = open_dataset(config, config.data.train)
    lengths = None
    if config.data.packing:
        # One rank measures for all: tables made by several could differ where their copies of the files do.
        cache = str(Path(config.train.output) / "lengths.json")
        lengths = from_rank_zero(lambda: length_table(dataset, cache, config.data.workers))
    order = RowOrder(len(dataset), config.train.seed, config.data.shuffle, lengths, config.train.seq_length)
    return _loader(config, topology, dataset, order, config.train.global_batch_size), order.rows_of_epoch(0)


def evaluation_loader(config: Config, topology: ParallelTopology) -> tuple[RowLoader, int]:
    """The held-out samples, one per row in their order, and their number; a step is one row on each replica."""
    dataset = open_dataset(config, config.data.eval)
    order = RowOrder(len(dataset), config.train.seed, shuffle=False)
    return _loader(config, topology, dataset, order, topology.grid.dp), len(dataset)


def held_out_gaps(config: Config) -> str:
    """A line about files that the records of ``data.eval`` name and that are not there; empty if all are. Raises ``ConfigError``
    as ``open_dataset``. Called on one rank."""
    try:
        records = list(open_dataset(config, config.data.eval).records)
    except RecordError as error:
        raise ConfigError(str(error)) from error
    paths = dict.fromkeys(medium.path for record in records for medium in record.media)
    missing = [path for path in paths if not os.path.exists(path)]
    if not missing:
        return ""
    more = f" and {len(missing) - SHOWN_FILES} more" if len(missing) > SHOWN_FILES else ""
    return (
        f"data.eval names {len(paths)} media files, of which {len(missing)} are missing: "
        f"{', '.join(missing[:SHOWN_FILES])}{more}; restore them or set data.media_dir before the evaluation comes: "
        "samples without their files are left out of it"
    )


def chance_level(files: Sequence[str], media_dir: str, media_format: str = "vila") -> float:
    """Accuracy of always giving the most frequent answers of ``files``; records without an answer do not count."""
    answers = Counter(
        tuple(turn.text for turn in record.turns if turn.role == "assistant")
        for record in RecordFiles(files, media_dir, media_format)
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
        gathered: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(gathered, reports, group=group)
        return sorted({report for part in gathered for report in part})

    return agree


def _loader(config: Config, topology: ParallelTopology, dataset: VilaDataset, order: RowOrder, batch: int) -> RowLoader:
    return RowLoader(
        dataset,
        order,
        global_batch_size=batch,
        dp_rank=topology.place.dp,
        dp_size=topology.grid.dp,
        document_multiple=topology.grid.document_multiple,
        row_multiple=topology.grid.row_multiple,
        local_frames=lambda row: local_frames(row, topology),
        agree=agreement(topology.block_cpu),
        image_size=config.model.vision.image_size,
        aspect=config.data.image_aspect,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )

"""The data side of a run: records, tokenizer, order and loader put together for one rank."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.config.schema import Config
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.lengths import length_table
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import RowOrder
from megatron_vila.data.records import BadRecordsError, RecordFiles, open_records, report_bad_records
from megatron_vila.data.tokenizer import load_tokenizer, tokenizer_warnings
from megatron_vila.errors import ConfigError, UserError
from megatron_vila.parallel.agreement import on_rank_zero
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.training.report_files import Reporting, replace_file

SHOWN_FILES = 4
"""most missing files that are named"""

logger = logging.getLogger(__name__)

BAD_RECORDS_FILE = "bad_records.txt"
JUDGED_FROM = 500
"""Samples from which on the share of broken ones is judged by data.max_broken."""


def open_dataset(config: Config, files: Sequence[str]) -> VilaDataset:
    """The samples of ``files`` as documents. Reads text only. Raises ``UserError`` that names file, place and cure."""
    try:
        records = open_records(config.data, files)
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.template)
        tokenizer_warnings(config, tokenizer)
        return VilaDataset(records, tokenizer, config.data, config.model, config.train.seq_length)
    except BadRecordsError as error:
        cure = "mend them"
        if config.data.bad_records == "stop":
            cure += ", or leave them out with data.bad_records=skip"
        raise ConfigError(f"{error}\n{cure}; `python -m megatron_vila.data check` lists all of them") from error


def tell_bad_records(config: Config) -> None:
    """Log what is wrong with the records of the run's files, in one report, and keep the whole of it in ``bad_records.txt``
    in the output folder. Errors are left to those who open the files."""
    bad: list[str] = []
    for files in filter(None, (config.data.train, config.data.eval)):
        try:
            records = open_records(config.data, files)
        except BadRecordsError as error:
            bad += error.bad.values()
        except UserError:
            continue
        else:
            bad += records.bad.values()
            if records.bad:
                logger.warning("%s", report_bad_records(records.bad, len(records)))
    path = Path(config.train.output) / BAD_RECORDS_FILE
    text = "".join(f"{reason}\n" for reason in bad)

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    if bad:
        Reporting().attempt(str(path), lambda: replace_file(path, write))
        logger.warning("all bad records are listed in %s", path)
    else:
        Reporting().attempt(str(path), lambda: path.unlink(missing_ok=True))


def training_loader(config: Config, topology: ParallelTopology) -> tuple[RowLoader, int]:
    """The training rows of this rank, and the rows of an epoch. With packing, rank 0 measures the samples and broadcasts
    their lengths to all ranks, or what is wrong, which all of them raise then (``UserError``).

    Raises ``ConfigError`` if so many records are bad that the run would end by data.max_broken anyway."""
    dataset = open_dataset(config, config.data.train)
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
        lengths = on_rank_zero(lambda: length_table(dataset, cache, config.data.workers))
    order = RowOrder(len(dataset), config.train.seed, config.data.shuffle, lengths, config.train.seq_length)
    return _loader(config, topology, dataset, order, config.train.global_batch_size), order.rows_of_epoch(0)


def evaluation_loader(config: Config, topology: ParallelTopology) -> tuple[RowLoader, VilaDataset]:
    """The held-out samples, one per row in their order, and the data set; a step is one row on each replica. A sample that
    cannot be used is left out."""
    dataset = open_dataset(config, config.data.eval)
    order = RowOrder(len(dataset), config.train.seed, shuffle=False)
    return _loader(config, topology, dataset, order, topology.grid.dp, replace_bad=False), dataset


def held_out_gaps(config: Config) -> str:
    """A line about files that the records of ``data.eval`` name and that are not there; empty if all are. Raises as
    ``open_dataset``. Called on one rank."""
    records = open_dataset(config, config.data.eval).records
    media = [medium for record in records.good() for medium in record.media]
    paths = dict.fromkeys(path for medium in media for path in medium.pictures or (medium.path,))
    missing = [path for path in paths if not os.path.exists(path)]
    if not missing:
        return ""
    more = f" and {len(missing) - SHOWN_FILES} more" if len(missing) > SHOWN_FILES else ""
    return (
        f"data.eval names {len(paths)} media files, of which {len(missing)} are missing: "
        f"{', '.join(missing[:SHOWN_FILES])}{more}; restore them or set data.media_dir before the evaluation comes: "
        "samples without their files are left out of it"
    )


def chance_level(records: RecordFiles, indices: Iterable[int]) -> float:
    """Accuracy of always giving the most frequent answers of the records ``indices``; all answers of a record, taken together,
    count as one, and records without an answer do not count."""
    answers = Counter(
        tuple(turn.text for turn in records[index].turns if turn.role == "assistant") for index in indices
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


def _loader(
    config: Config,
    topology: ParallelTopology,
    dataset: VilaDataset,
    order: RowOrder,
    batch: int,
    replace_bad: bool = True,
) -> RowLoader:
    return RowLoader(
        dataset,
        order,
        topology.grid,
        topology.rank,
        global_batch_size=batch,
        agree=agreement(topology.block_cpu),
        image_size=config.model.vision.image_size,
        aspect=config.data.image_aspect,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        replace_bad=replace_bad,
    )

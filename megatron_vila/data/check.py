"""Reads all samples of some files as the trainer would, and says which of them it could not use, and why.

Samples go through the loader that training has, each alone: the record is parsed, its text rendered, its frames are chosen and
decoded.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_vila.config.schema import Config
from megatron_vila.data import held_out
from megatron_vila.data.cards import Alone
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.fields import RecordError
from megatron_vila.data.held_out import HeldOutLoader, LeftOut
from megatron_vila.data.media import is_there
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.rows import LoadedRow
from megatron_vila.data.sources.joined import Joined
from megatron_vila.data.sources.open import PARTS, open_records
from megatron_vila.data.sources.source import BadRecordsError, Source
from megatron_vila.data.tokenizer import load_tokenizer, tokenizer_warnings, train_tokenizer
from megatron_vila.plan.bounds import MOST
from megatron_vila.plan.grid import GridShape

PIXELS = 14
"""Side of the pictures that decoded frames are scaled to: they are only looked at by the decoder."""

USUAL = "models/longvila-7b"
"""The settings whose pictures and lengths count where none are given."""

ANY_VOCABULARY = int(MOST["model.llm.vocab_size"])
"""``model.llm.vocab_size`` where no model is named: any tokenizer goes."""

KINDS = ("bad_record", "missing", "broken", "too_long")
"""Why a sample cannot be used: its record breaks the format, a file is not there, something else fails, it does not fit."""


@dataclass(frozen=True)
class Problem:
    """A sample that cannot be used: ``place`` is its file and number, ``kind`` one of ``KINDS``."""

    place: str
    sample_id: str
    kind: str
    reason: str


@dataclass
class Report:
    """What was found so far. ``tokens`` and ``longest`` (tokens of the longest sample) stay None where no tokenizer is known."""

    files: list[str]
    samples: int
    checked: int = 0
    frames: int = 0
    tokens: int | None = None
    longest: int | None = None
    truncated: int = 0
    unanswered: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def usable(self) -> int:
        return self.checked - len(self.problems)

    @property
    def counts(self) -> dict[str, int]:
        """The problems by kind."""
        found = Counter(problem.kind for problem in self.problems)
        return {kind: found[kind] for kind in KINDS}


def check(config: Config, sets: Mapping[str, Sequence[str]], threads: int) -> Iterator[Report]:
    """The same report after each sample of ``sets``, first with nothing checked; ``threads`` read at once. ``sets`` are files and
    folders by where a run would name them, "train" or "eval", which says what part of a folder with a split is read.

    Without ``data.tokenizer`` texts are rendered with a tokenizer of single bytes and nothing is said of lengths. Raises
    ``RecordError`` for a file that holds no list of records, ``SettingError`` for settings.
    """
    data = replace(config.data, bad_records="skip")
    report = Report([file for paths in sets.values() for file in paths], 0)
    sources: list[Source] = []
    for name, paths in sets.items():
        if paths or not report.files:  # without any, opening says what is expected
            try:
                sources.append(open_records(data, paths, PARTS[name]))
            except BadRecordsError as error:
                report.problems += map(_bad_record, error.bad.values())
    report.checked = len(report.problems)
    report.samples = report.checked + sum(map(len, sources))
    if not sources:
        yield report
        return
    dataset = _dataset(replace(config, data=data), Joined(sources))
    if data.tokenizer:
        report.tokens = report.longest = 0
    yield report
    with _loader(dataset, threads, prefetch=4 * threads, decode=True) as rows:
        for index in range(len(dataset)):
            row = rows.sample(index)
            _add(report, row, dataset, index)
            yield report


def problem_of(dataset: VilaDataset, index: int, decode: bool) -> Problem | None:
    """Why sample ``index`` cannot be used; None if it can. Its pixels are read where ``decode`` says so."""
    log = logging.getLogger(held_out.__name__)
    level = log.level
    # The caller tells it.
    log.setLevel(logging.ERROR)
    try:
        with _loader(dataset, threads=1, prefetch=0, decode=decode) as rows:
            row = rows.sample(index)
    finally:
        log.setLevel(level)
    return problem(dataset, index, row.kind, row.reason) if isinstance(row, LeftOut) else None


def _bad_record(reason: str) -> Problem:
    return Problem("", "", "bad_record", reason)


def _dataset(config: Config, records: Source) -> VilaDataset:
    if config.data.tokenizer:
        tokenizer, length = load_tokenizer(config.data.tokenizer), config.train.seq_length
        if config.model.llm.vocab_size != ANY_VOCABULARY:
            tokenizer_warnings(config, tokenizer)
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, length = train_tokenizer(["text"], folder, 400), 2**40
    return VilaDataset(records, tokenizer, config.data, config.model, length)


def _loader(dataset: VilaDataset, threads: int, prefetch: int, decode: bool) -> HeldOutLoader:
    aspect = dataset.data.image_aspect
    decoder = RowDecoder(dataset.probe, dataset.failures, image_size=PIXELS, aspect=aspect, workers=threads)
    return HeldOutLoader(dataset, GridShape(), 0, decoder, agree=Alone().agree, prefetch=prefetch, decode=decode)


def _add(report: Report, row: LoadedRow | LeftOut, dataset: VilaDataset, index: int) -> None:
    report.checked += 1
    if isinstance(row, LeftOut):
        report.problems.append(problem(dataset, index, row.kind, row.reason))
        return
    report.frames += sum(unit.frames for unit in row.row.units)
    report.truncated += row.stats.truncated
    report.unanswered += row.stats.unsupervised
    if report.tokens is not None and report.longest is not None:
        report.tokens += sum(row.row.lengths)
        report.longest = max(report.longest, *row.row.lengths)


def problem(dataset: VilaDataset, index: int, kind: str, reason: str) -> Problem:
    """What makes sample ``index`` unusable, by the ``kind`` ("broken" or "too_long") and the reason that loading it gave."""
    if index in dataset.records.bad:
        return _bad_record(reason)
    if kind == "broken":
        try:
            media = dataset.records.record(index).media
        except RecordError as error:
            return _bad_record(str(error))
        paths = [path for medium in media for path in medium.pictures or (medium.path,)]
        kind = "broken" if all(map(is_there, paths)) else "missing"
    return Problem(dataset.records.name(index), dataset.name(index), kind, reason)

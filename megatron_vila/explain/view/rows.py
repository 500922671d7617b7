"""The first rows of a run as a page shows them: planned by the run's own stream, packed and padded as they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vila.config.schema import Config
from megatron_vila.data.cards import Alone, CardMaker
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.sources.open import PARTS, open_blend
from megatron_vila.data.stream import CardsMissingError, StepPlan, StreamState
from megatron_vila.explain.view.tokens import visible
from megatron_vila.host_memory import cores_of_rank
from megatron_vila.plan.grid import GridShape, Layout
from megatron_vila.plan.row import IGNORE, Document, pack
from megatron_vila.training.feed import open_stream


@dataclass(frozen=True)
class Packed:
    """A document in a row: sample ``index`` of data.train, its numbers, and the padding behind it in tokens."""

    index: int
    sample_id: str
    tokens: int
    trained: int
    frames: int
    padding: int


@dataclass(frozen=True)
class Row:
    """Row ``number`` of ``step`` (from 0). ``share`` is its predicted time as a part of the mean of its step, ``room`` what is
    left of train.seq_length, ``vision`` the patches that the tower encodes for it."""

    step: int
    number: int
    documents: tuple[Packed, ...]
    share: float
    room: int
    vision: int

    @property
    def tokens(self) -> int:
        """without padding"""
        return sum(document.tokens for document in self.documents)

    @property
    def padding(self) -> int:
        return sum(document.padding for document in self.documents)

    @property
    def trained(self) -> int:
        return sum(document.trained for document in self.documents)


def first_rows(config: Config, dataset: VilaDataset, count: int) -> list[Row]:
    """The first ``count`` rows of a run over ``dataset``, which is data.train. No pixel is read, so a sample that turns out to be
    broken when it is decoded still stands in them.

    Raises ``NoUsableSampleError`` if there is nothing to train on.
    """
    parallel = config.parallel
    grid = GridShape.of(Layout.of(parallel).size, parallel.tp, parallel.pp, parallel.ulysses, parallel.ring)
    rows: list[Row] = []
    for step, plan in enumerate(_steps(config, dataset)):
        mean = sum(plan.costs) / len(plan.costs)
        for number, (records, cost) in enumerate(zip(plan.rows, plan.costs, strict=True)):
            if len(rows) == count:
                return rows
            documents = [dataset.build(record).document for record in records]
            row = pack(documents, grid.document_multiple, grid.row_multiple)
            paddings = (np.diff(row.cu_seqlens) - row.lengths).tolist()
            packed = tuple(map(_packed, records, documents, paddings))
            room = max(0, config.train.seq_length - sum(row.lengths))
            rows.append(Row(step, number, packed, cost / mean, room, sum(unit.cost for unit in row.units)))
    return rows


def _steps(config: Config, dataset: VilaDataset) -> Iterator[StepPlan]:
    """The steps of a run from its start, without end."""
    stream = open_stream(config, dataset, open_blend(config.data, config.data.train, PARTS["train"]))
    cards = CardMaker(dataset, stream.cards, Alone(), cores_of_rank())
    state, known = StreamState(), 0
    try:
        while True:
            try:
                plan = stream.plan(state)
            except CardsMissingError:
                cards.share(stream.order.records(known, stream.rows))
                known += stream.rows
                continue
            yield plan
            state = plan.after
    finally:
        cards.close()


def _packed(index: int, document: Document, padding: int) -> Packed:
    return Packed(
        index,
        visible(document.sample_id),
        len(document),
        int((document.labels != IGNORE).sum()),
        sum(frame.unit.frames for frame in document.frames),
        padding,
    )

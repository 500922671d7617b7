"""The rows of each training step, on every rank: planned by all alike, dealt to the replicas, decoded ahead.

Every rank plans the same steps (``stream.py``) and makes the rows of its replica. Before a step is given out, all ranks of the
run agree on which of its samples could not be decoded. If there are any, the step is planned again from where it began, without
them, until all its samples can be decoded everywhere. Plans and rows that were made ahead and no longer hold are given up; what
they found out early counts only when its sample comes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from megatron_vila.data.cards import CardMaker, Exchange
from megatron_vila.data.dataset import NoUsableSampleError, VilaDataset
from megatron_vila.data.reports import broken_in
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.rows import LoadedRow, MadeRow, RowMaker
from megatron_vila.data.stream import CardsMissingError, StepPlan, Stream, StreamState
from megatron_vila.plan.dealing import deal_rows, spread
from megatron_vila.plan.grid import GridShape

logger = logging.getLogger(__name__)

SHOWN_REASONS = 3
"""Broken samples that a message names where none can be used."""


@dataclass(frozen=True)
class LoadedStep:
    """The rows of this replica in a step, one per micro-batch, and the ``plan`` of the whole step, the same on all ranks.

    ``spread`` is that of the predicted costs of the replicas; ``wait_s`` are the seconds for which the caller stood still.
    """

    rows: list[LoadedRow]
    plan: StepPlan
    spread: float
    wait_s: float


@dataclass(frozen=True)
class _Dealt:
    """A planned step and the numbers of this replica's rows in it."""

    plan: StepPlan
    mine: list[int]
    spread: float

    @property
    def keys(self) -> list[tuple[int, ...]]:
        return [self.plan.instances[row] for row in self.mine]


class RowLoader:
    """The steps of one rank from ``state`` on. Use it as a context manager, or call ``close``: it owns threads.

    * ``stream``: plans the steps. Its cards come from ``cards``, made and exchanged as they are needed.
    * ``grid`` and this ``rank`` in it: its replica, how rows are padded, and the rank's part of each (``plan/row_plan.py``).
    * ``exchange``: what the ranks of the whole run tell each other. Its collectives are called in the thread of the caller, in
      the same order on every rank.
    * ``decoder`` decodes up to ``prefetch`` rows beyond a step; it is closed with the loader. ``workers`` threads make cards.
    """

    def __init__(
        self,
        dataset: VilaDataset,
        stream: Stream,
        state: StreamState,
        grid: GridShape,
        rank: int,
        decoder: RowDecoder,
        *,
        exchange: Exchange,
        workers: int,
        prefetch: int,
    ) -> None:
        self.state = state
        """where the stream stands after the step that was given out last"""
        self._dataset, self._stream, self._exchange = dataset, stream, exchange
        self._replicas, self._replica = grid.dp, grid.coordinates(rank).dp
        self._prefetch = max(0, prefetch)
        self._steps_ahead = -(-self._prefetch // (stream.rows // grid.dp))
        self._maker = RowMaker(dataset, grid, rank, decoder)
        self._cards = CardMaker(dataset, stream.cards, exchange, workers)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._ahead: list[Future[_Dealt]] = []
        self._jobs: dict[tuple[int, ...], Future[MadeRow]] = {}
        self._current: set[tuple[int, ...]] = set()
        self._first_ahead = 0  # steps given out before the first of those ahead
        self._lock = threading.Lock()
        self._known: int | None = None
        self._block = stream.rows
        self._unanswered: set[int] = set()

    def __enter__(self) -> RowLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads: rows not begun are given up, a row in work ends at its next picture."""
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._maker.close()
        self._cards.close()
        self._jobs.clear()

    @property
    def epoch(self) -> int:
        """Samples drawn in an epoch."""
        return self._stream.order.epoch

    @property
    def broken(self) -> Mapping[int, str]:
        """The bad records, and the broken samples met so far: record index to reason."""
        return dict(self._cards.broken)

    def next_step(self) -> LoadedStep:
        """The step after ``state``, which moves on.

        Collective over all ranks of the run. Raises ``LoaderError`` on all of them if any failed for another reason than a
        broken sample, and ``NoUsableSampleError`` on all if there is nothing to train on.
        """
        started_s = time.perf_counter()
        self._look_ahead()
        found: dict[int, str] = {}
        step = self._planned(self._ahead[0].result)
        with self._lock:
            self._ahead.pop(0)
            self._first_ahead += 1
        while True:
            made = self._make(step)
            reports = self._exchange.agree([report for row in made for report in row.reports()])
            if not reports:
                break
            found |= self._learn(reports, made)
            made = []  # what was decoded makes room
            self._give_up_ahead()
            step = self._planned(partial(self._plan, found))
        with self._lock:
            for key in step.keys:
                del self._jobs[key]
        self._block = max(self._stream.rows, step.plan.after.following - self.state.following)
        self.state = step.plan.after
        # A step that was planned again may have come further than its cards were asked for: they were known from earlier epochs.
        self._known = max(self._known or 0, self.state.following)
        self._name_unanswered(step.plan)
        self._look_ahead()
        rows = [self._loaded(row, number) for row, number in zip(made, step.mine, strict=True)]
        return LoadedStep(rows, step.plan, step.spread, time.perf_counter() - started_s)

    def _planned(self, plan: Callable[[], _Dealt]) -> _Dealt:
        try:
            return plan()
        except NoUsableSampleError as error:
            reasons = list(self._cards.broken.values())[:SHOWN_REASONS]
            raise NoUsableSampleError("\n  ".join([str(error), *reasons])) from None

    @staticmethod
    def _loaded(made: MadeRow, number: int) -> LoadedRow:
        row = made.loaded(number)
        assert row is not None, "a row of which nothing was reported holds all its samples"
        return row

    def _make(self, step: _Dealt) -> list[MadeRow]:
        """The rows of this replica in ``step``, while those after it are begun."""
        with self._lock:
            for key in self._current.difference(step.keys) & self._jobs.keys():
                self._maker.give_up(self._jobs.pop(key))  # of the step as it was planned before: its pixels make room
            self._current = set(step.keys)
            first = (self._first_ahead - 1) * len(step.mine)
            jobs = [self._begin(first + place, step.plan, number) for place, number in enumerate(step.mine)]
        self._begin_ahead()
        return [job.result().decoded() for job in jobs]

    def _learn(self, reports: Sequence[str], made: Sequence[MadeRow]) -> dict[int, str]:
        """The samples of a step that some rank found to be broken."""
        found = {}
        own_error = next((row.error for row in made if row.error is not None), None)
        for record, reason in broken_in(reports, "loading a row", own_error):
            found[record] = reason
            self._cards.tell_broken(record, reason)
        return found

    def _name_unanswered(self, plan: StepPlan) -> None:
        """Name samples that train nothing, each once."""
        if not plan.counts["unsupervised"]:
            return
        for record in (record for row in plan.rows for record in row):
            if not self._stream.cards.labels[record] and record not in self._unanswered:
                self._unanswered.add(record)
                logger.warning("sample %s has no answer to learn: it trains nothing", self._dataset.name(record))

    # -----------------------------------------------------------------------------------------------------------------
    # planning ahead

    def _look_ahead(self) -> None:
        """Know the cards of the coming steps, and have these planned in a thread. Collective, as often on every rank."""
        steps = 1 + self._steps_ahead
        if self._known is None:
            self._cards.share(self._stream.waiting(self.state))
            self._known = self.state.following
        while not self._stream.covers(self.state, self._known, steps):
            self._share()
        while len(self._ahead) < steps:
            before = self._ahead[-1] if self._ahead else None
            self._ahead.append(self._planner.submit(self._plan_ahead, self.state, before))

    def _share(self) -> None:
        """Exchange the cards of the samples that come next, and begin to make those of the samples after them."""
        assert self._known is not None
        block = max(self._block, (self._known - self.state.following) // 2)
        self._cards.share(self._stream.order.records(self._known, block))
        self._known += block
        self._cards.prepare(self._stream.order.records(self._known, self._block))

    def _plan_ahead(self, state: StreamState, before: Future[_Dealt] | None) -> _Dealt:
        """The step after ``before``, or after ``state``; runs in the planning thread, which has planned ``before``."""
        dealt = self._deal(self._stream.plan(state if before is None else before.result().plan.after))
        self._begin_ahead(dealt)
        return dealt

    def _plan(self, found: Mapping[int, str]) -> _Dealt:
        """The step after ``state`` without the samples ``found`` broken. Collective, where more cards are needed."""
        while True:
            try:
                return self._deal(self._stream.plan(self.state, found))
            except CardsMissingError:
                self._share()

    def _deal(self, plan: StepPlan) -> _Dealt:
        hands = deal_rows(plan.costs, self._replicas)
        return _Dealt(plan, hands[self._replica], spread(plan.costs, hands))

    def _give_up_ahead(self) -> None:
        """Forget the steps that were planned from a state that will not come."""
        for planned in self._ahead:
            if not planned.cancel():
                planned.exception()  # waits: nothing may be planned any more from cards that change
        self._ahead.clear()

    def _begin_ahead(self, last: _Dealt | None = None) -> None:
        """Begin the rows of the planned steps, the first ``prefetch`` of them; ``last`` has just been planned. Rows that no plan
        has any more are given up."""
        with self._lock:
            planned = [p.result() for p in list(self._ahead) if p.done() and not p.cancelled() and p.exception() is None]
            planned += [last] if last is not None else []
            if len(planned) > self._steps_ahead:
                kept = self._current.union(*(step.keys for step in planned))
                for key in [key for key in self._jobs if key not in kept]:
                    self._maker.give_up(self._jobs.pop(key))
            rows = [(step.plan, number) for step in planned for number in step.mine]
            first = self._first_ahead * (self._stream.rows // self._replicas)
            for place, (plan, number) in enumerate(rows[: self._prefetch]):
                self._begin(first + place, plan, number)

    def _begin(self, turn: int, plan: StepPlan, number: int) -> Future[MadeRow]:
        key = plan.instances[number]
        if key not in self._jobs:
            records = plan.rows[number]
            lengths = self._stream.cards.tokens[list(records)].tolist()
            self._jobs[key] = self._maker.begin(turn, records, lengths)
        return self._jobs[key]

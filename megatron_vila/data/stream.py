"""The stream of a run: which samples form the rows of the next step, and what is left for later steps.

The samples come in the order of ``SampleOrder``, epoch after epoch without a break. Those that cannot be used are left out where
they come; the others wait in a window of bounded size, from which the rows of a step are packed. A step and the state after it
are a function of the state before it, of the cards, and of the samples that decoding found to be broken. Nothing depends on the
layout, on threads or on what was known early: a run that is resumed anywhere, under any layout, goes on as if it had not ended.

Legend: n samples that wait, oldest first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_vila.data.cards import BROKEN, TOO_LONG, UNKNOWN, USABLE, Cards
from megatron_vila.data.dataset import NoUsableSampleError
from megatron_vila.data.order import SampleOrder
from megatron_vila.plan.flops import FlopPrices
from megatron_vila.plan.packing import LOOK_AHEAD, pack_samples

_COST_UNIT = 10**6
"""FLOPs in the unit in which costs are counted: whole numbers, so that sums are the same in any order."""


@dataclass(frozen=True, eq=False)
class StreamState:
    """Where a run stands between two steps. The same on all ranks.

    ``following`` is the next instance of ``SampleOrder`` that comes into the window, ``waiting`` (int64 [n], ascending) those
    that wait in it, ``undecodable`` (int64, ascending) the records that were found to be broken when they were decoded.
    """

    following: int = 0
    waiting: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    undecodable: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        return {
            "following": self.following,
            "waiting": self.waiting.tolist(),
            "undecodable": self.undecodable.tolist(),
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any], samples: int) -> StreamState:
        """The state that ``to_json`` gave, for a run of ``samples`` records. Raises ``ValueError`` if it is none."""
        following, waiting, undecodable = (kept.get(name) for name in ("following", "waiting", "undecodable"))
        if type(following) is not int or not _ascend(waiting, following) or not _ascend(undecodable, samples):
            raise ValueError("the place in the stream of samples is not one that a run has saved")
        return cls(following, np.array(waiting, dtype=np.int64), np.array(undecodable, dtype=np.int64))


def _ascend(numbers: Any, end: int) -> bool:
    """Whether these are whole numbers from 0 to below ``end``, each larger than the one before."""
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return False
    return all(low < high for low, high in zip([-1, *numbers], [*numbers, end], strict=True))


@dataclass(frozen=True)
class StepPlan:
    """The rows of a step, over all replicas, and what became of the samples."""

    rows: tuple[tuple[int, ...], ...]
    """records of each row, in the order in which they are packed"""
    instances: tuple[tuple[int, ...], ...]
    """the same as instances of the order"""
    costs: tuple[int, ...]
    """predicted FLOPs of each row, in millions"""
    tokens: int
    """of all rows, without padding"""
    labels: int
    """supervised ones"""
    counts: Mapping[str, int]
    """samples ``drawn`` from the order, some of which wait for a later step; ``left_out_broken``, ``left_out_too_long``; of those
    in the rows ``truncated``, ``unsupervised``"""
    after: StreamState


class CardsMissingError(LookupError):
    """A step cannot be planned yet: not all cards that it needs are known."""


class Stream:
    """Plans the steps of a run of ``rows`` rows a step; ``price`` predicts what a row costs.

    With ``packing`` a row holds as many samples as fit ``seq_length`` tokens and ``vision_capacity``, without it one. Safe for
    threads, as long as cards are only added.
    """

    def __init__(
        self,
        order: SampleOrder,
        cards: Cards,
        price: FlopPrices,
        *,
        rows: int,
        packing: bool,
        seq_length: int,
        vision_capacity: int,
    ) -> None:
        self.order, self.cards, self.rows, self.seq_length = order, cards, rows, seq_length
        self._price, self._packing, self._vision_capacity = price, packing, vision_capacity
        # The window is measured in tokens; without packing in samples.
        self._per_step = rows * seq_length if packing else rows
        self._full = LOOK_AHEAD * self._per_step if packing else rows

    def covers(self, state: StreamState, known: int, steps: int) -> bool:
        """Whether ``steps`` steps from ``state`` can surely be planned when cards are known up to instance ``known``."""
        coming = self._sizes(self.order.records(state.following, known - state.following), state.undecodable)
        if len(coming) >= self.order.epoch and not coming[-self.order.epoch :].any():
            return True  # no sample can be used: the plan says so
        waiting = self._sizes(self.waiting(state), state.undecodable)
        return int(waiting.sum() + coming.sum()) >= self._full + (steps - 1) * self._per_step

    def plan(self, state: StreamState, found: Collection[int] = ()) -> StepPlan:
        """The step after ``state``, if decoding has ``found`` these records to be broken.

        Raises ``CardsMissingError``, and ``NoUsableSampleError`` if a whole epoch holds no sample that can be used.
        """
        undecodable = np.union1d(state.undecodable, np.fromiter(found, dtype=np.int64))
        records = self.waiting(state)
        usable = ~np.isin(records, undecodable)
        counts = {"left_out_broken": int((~usable).sum()), "left_out_too_long": 0}
        waiting, records = state.waiting[usable], records[usable]
        following, waiting, records = self._fill(state.following, waiting, records, undecodable, counts)
        places = self._pack(records)
        taken = np.zeros(len(waiting), dtype=bool)
        taken[[place for row in places for place in row]] = True
        used = records[taken]
        counts |= {
            "truncated": int((self.cards.cut[used] > 0).sum()),
            "unsupervised": int((self.cards.labels[used] == 0).sum()),
            "drawn": following - state.following,
        }
        costs = self._costs(records)
        return StepPlan(
            rows=tuple(tuple(records[row].tolist()) for row in places),
            instances=tuple(tuple(waiting[row].tolist()) for row in places),
            costs=tuple(int(costs[row].sum()) for row in places),
            tokens=int(self.cards.tokens[used].sum()),
            labels=int(self.cards.labels[used].sum()),
            counts=counts,
            after=StreamState(following, waiting[~taken], undecodable),
        )

    def _fill(
        self, following: int, waiting: np.ndarray, records: np.ndarray, undecodable: np.ndarray, counts: dict[str, int]
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Let samples come until the window is full; those that cannot be used are left out and counted."""
        total, unusable, block = int(self._sizes(records, undecodable).sum()), 0, 64
        while total < self._full:
            coming = self.order.records(following, block)
            sizes = self._sizes(coming, undecodable)
            come = int(np.searchsorted(total + np.cumsum(sizes), self._full)) + 1
            coming, sizes = coming[:come], sizes[:come]
            if (self.cards.state[coming] == UNKNOWN).any():
                raise CardsMissingError
            good = sizes > 0
            too_long = int((self.cards.state[coming] == TOO_LONG).sum())
            counts["left_out_too_long"] += too_long
            counts["left_out_broken"] += int((~good).sum()) - too_long
            waiting = np.concatenate([waiting, following + np.flatnonzero(good)])
            records = np.concatenate([records, coming[good]])
            following, total = following + len(coming), total + int(sizes.sum())
            unusable = 0 if good.any() else unusable + len(coming)
            if unusable >= self.order.epoch:
                raise NoUsableSampleError(self._none_usable(undecodable))
            block = min(2 * block, 2**14)
        return following, waiting, records

    def _pack(self, records: np.ndarray) -> list[list[int]]:
        if not self._packing:
            return [[place] for place in range(self.rows)]
        tokens, vision = self.cards.tokens[records].tolist(), self.cards.vision[records].tolist()
        return pack_samples(tokens, vision, self.rows, self.seq_length, self._vision_capacity)

    def _sizes(self, records: np.ndarray, undecodable: np.ndarray) -> np.ndarray:
        """How much of the window each record takes; 0 for those that cannot be used or are not known yet."""
        usable = (self.cards.state[records] == USABLE) & ~np.isin(records, undecodable)
        return np.where(usable, self.cards.tokens[records] if self._packing else 1, 0).astype(np.int64)

    def waiting(self, state: StreamState) -> np.ndarray:
        """The records that wait in ``state``: int64 [n]."""
        if not len(state.waiting):
            return np.zeros(0, dtype=np.int64)
        first = int(state.waiting[0])
        return self.order.records(first, int(state.waiting[-1]) - first + 1)[state.waiting - first]

    def _costs(self, records: np.ndarray) -> np.ndarray:
        """Predicted FLOPs of each record in millions: int64. Products and sums of float64 are the same on every machine."""
        cards, price = self.cards, self._price
        tokens = cards.tokens[records].astype(np.float64)
        flops = tokens * price.token + tokens * tokens * price.pair + cards.labels[records] * float(price.label)
        flops += cards.squares[records] * float(price.square) + cards.visual_tokens[records] * float(price.visual_token)
        return np.rint(flops / _COST_UNIT).astype(np.int64)

    def _none_usable(self, undecodable: np.ndarray) -> str:
        state = self.cards.state
        broken = int(((state == BROKEN) | ((state == USABLE) & np.isin(np.arange(len(state)), undecodable))).sum())
        return (
            f"none of the {len(state)} samples can be used: {broken} are broken, {int((state == TOO_LONG).sum())} do not fit "
            f"train.seq_length={self.seq_length}"
        )

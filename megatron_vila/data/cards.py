"""Cards: what packing must know of a sample, in a few numbers, or why it cannot be used.

A card is made from metadata alone, once per sample and run, by threads ahead of need. The ranks of the whole run share the work:
each makes its part of the samples that come next and all exchange them, so that tokenizing does not grow with data parallelism
and no table of all lengths is needed beforehand.

Legend: N records of the run, m of them exchanged at a time, F = 7 numbers of a card.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megatron_vila.data.dataset import BrokenSampleError, Sample, TooLongError, VilaDataset
from megatron_vila.data.reports import broken_in, broken_report, error_report
from megatron_vila.plan.row import IGNORE

logger = logging.getLogger(__name__)

UNKNOWN, USABLE, BROKEN, TOO_LONG, _FAILED = range(5)
"""``state`` of a card; the last one: making it failed for another reason than the sample, which ends the run."""

FIELDS = ("state", "tokens", "labels", "cut", "squares", "visual_tokens", "vision")
"""Numbers of a card: LLM tokens without padding, supervised ones, frames left out to make it fit, pictures as the tower takes
them, tokens that they become, and their cost in patches."""


class Exchange(Protocol):
    """What the ranks that share a stream of samples tell each other. Collectives, called in the thread that trains."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def agree(self, reports: list[str]) -> list[str]:
        """The union of the reports of all ranks, sorted."""
        ...

    def gather(self, part: np.ndarray) -> np.ndarray:
        """The parts of all ranks, which have the same shape, one after the other: int64 [ranks, *part.shape]."""
        ...


class Alone:
    """The ``Exchange`` of a run of one rank."""

    rank, ranks = 0, 1

    def agree(self, reports: list[str]) -> list[str]:
        return sorted(set(reports))

    def gather(self, part: np.ndarray) -> np.ndarray:
        return part[None]


class Cards:
    """The cards of ``samples`` records, as far as they are known: int32 arrays [N], one for each of ``FIELDS``, read only.

    Memory that no card has touched is not taken from the machine.
    """

    def __init__(self, samples: int) -> None:
        self._table = np.zeros((len(FIELDS), samples), dtype=np.int32)
        self.state, self.tokens, self.labels, self.cut, self.squares, self.visual_tokens, self.vision = self._table

    def put(self, records: np.ndarray, cards: np.ndarray) -> None:
        """Take in ``cards`` int64 [m, F] of ``records`` [m]. The state, which readers in other threads look at, comes last."""
        self._table[1:, records] = cards.T[1:]
        self._table[0, records] = cards.T[0]


class CardMaker:
    """Makes the cards of ``dataset`` that ``cards`` lacks. Owns ``workers`` threads until ``close``.

    Every rank asks for the same records in the same order.
    """

    def __init__(self, dataset: VilaDataset, cards: Cards, exchange: Exchange, workers: int) -> None:
        self._dataset, self._cards, self._exchange = dataset, cards, exchange
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="cards")
        self._jobs: dict[int, Future[tuple[int, ...] | str | Exception]] = {}
        self.broken: dict[int, str] = dict(dataset.records.bad)
        """broken records known so far, with the reason"""

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._jobs.clear()

    def prepare(self, records: np.ndarray) -> None:
        """Begin to make this rank's part of the cards of ``records``, which are to be shared next."""
        for record in self._mine(self._missing(records)):
            self._begin(record)

    def share(self, records: np.ndarray) -> None:
        """Make the cards of ``records`` known to all ranks. Collective: ``gather`` if any is missing, ``agree`` if one is bad.

        Raises ``LoaderError`` on every rank if making one failed on any of them.
        """
        missing = self._missing(records)
        if not len(missing):
            return
        mine = self._mine(missing)
        part = np.zeros((-(-len(missing) // self._exchange.ranks), len(FIELDS)), dtype=np.int64)
        reports, failure = [], None
        for record in mine:
            self._begin(record)
        for place, record in enumerate(mine):
            card = self._jobs.pop(record).result()
            if isinstance(card, Exception):
                failure = failure or card
                reports.append(error_report(card, f"sample {self._dataset.name(record)}"))
                part[place, 0] = _FAILED
            elif isinstance(card, str):
                reports.append(broken_report(record, card))
                part[place, 0] = BROKEN
            else:
                part[place] = card
        gathered = self._exchange.gather(part)
        # Rank r made the records r, r + ranks, ...: dealing them out again puts them into their order.
        cards = gathered.transpose(1, 0, 2).reshape(-1, len(FIELDS))[: len(missing)]
        if np.isin(cards[:, 0], (BROKEN, _FAILED)).any():
            for broken, reason in broken_in(self._exchange.agree(reports), "reading a sample", failure):
                self.tell_broken(broken, reason)
        self._cards.put(missing, cards)

    def tell_broken(self, record: int, reason: str) -> None:
        """Keep that ``record`` is broken; the log names it once."""
        if record not in self.broken:
            self.broken[record] = reason
            logger.warning("sample %s is broken and left out: %s", self._dataset.name(record), reason)

    def _missing(self, records: np.ndarray) -> np.ndarray:
        """Those without a card, each once, in their order. Bad records get theirs at once: every rank knows them."""
        missing = records[self._cards.state[records] == UNKNOWN]
        missing = missing[np.sort(np.unique(missing, return_index=True)[1])]
        bad = np.array([record in self._dataset.records.bad for record in missing.tolist()], dtype=bool)
        if bad.any():
            self._cards.put(missing[bad], np.tile([BROKEN, *[0] * (len(FIELDS) - 1)], (int(bad.sum()), 1)))
            missing = missing[~bad]
        return missing

    def _mine(self, records: np.ndarray) -> list[int]:
        return records[self._exchange.rank :: self._exchange.ranks].tolist()

    def _begin(self, record: int) -> None:
        if record not in self._jobs:
            self._jobs[record] = self._pool.submit(self._make, record)

    def _make(self, record: int) -> tuple[int, ...] | str | Exception:
        """The card of a record, the reason why it is broken, or what failed; runs in a thread."""
        try:
            return card_of(self._dataset.build(record))
        except BrokenSampleError as error:
            return str(error)
        except TooLongError:
            return (TOO_LONG, *[0] * (len(FIELDS) - 1))
        except Exception as error:
            return error


def card_of(sample: Sample) -> tuple[int, ...]:
    """The card of a sample that can be used."""
    document, units = sample.document, [frame.unit for frame in sample.document.frames]
    return (
        USABLE,
        len(document),
        int((document.labels != IGNORE).sum()),
        sample.dropped_frames,
        sum(unit.squares for unit in units),
        sum(unit.tokens for unit in units),
        sum(unit.cost for unit in units),
    )

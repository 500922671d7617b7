"""Samples that are asked for by number, one in a row, decoded ahead by threads: for evaluations and checks.

Nothing takes the place of a sample that cannot be used. If one rank cannot decode it, its whole model-parallel block leaves it
out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.reports import broken_in
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.rows import LoadedRow, MadeRow, RowMaker
from megatron_vila.plan.grid import GridShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOut:
    """Held-out sample ``number``, which is record ``index``, cannot be used: ``kind`` is "broken" or "too_long", ``reason`` says
    what is wrong in words."""

    number: int
    index: int
    kind: str
    reason: str


class HeldOutLoader:
    """The samples of ``dataset`` in their order, dealt to the replicas in turn. Use it as a context manager: it owns threads.

    * ``grid`` and this ``rank`` in it: its replica, how rows are padded, and the rank's part of each.
    * ``agree(reports)``: the union, in one order, of the reports of all ranks of the model-parallel block. A collective: it is
      called in the thread of the caller, once per sample, in the same order on every rank of the block.
    * ``decoder`` decodes up to ``prefetch`` samples ahead; it is closed with the loader.
    * ``decode``: whether pixels are read; without them rows have none.
    """

    def __init__(
        self,
        dataset: VilaDataset,
        grid: GridShape,
        rank: int,
        decoder: RowDecoder,
        *,
        agree: Callable[[list[str]], list[str]],
        prefetch: int,
        decode: bool = True,
    ) -> None:
        self._dataset, self._grid, self._rank, self._agree = dataset, grid, rank, agree
        self._prefetch = max(0, prefetch)
        self._maker = RowMaker(dataset, grid, rank, decoder, decode=decode)
        self._jobs: dict[int, Future[MadeRow]] = {}
        self._told: set[int] = set()

    def __enter__(self) -> HeldOutLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads: rows not begun are given up, a row in work ends at its next picture."""
        self._maker.close()
        self._jobs.clear()

    def sample(self, step: int) -> LoadedRow | LeftOut:
        """The sample of this replica in ``step``; after the last one it begins again.

        Collective: ``agree``, over the model-parallel block. Raises ``LoaderError`` on all ranks of the block if any of them
        failed for another reason than the sample.
        """
        for ahead in range(step, step + self._prefetch + 1):
            if ahead not in self._jobs:
                self._jobs[ahead] = self._maker.begin(ahead, [self._number(ahead) % len(self._dataset)])
        for old in [place for place in self._jobs if not step <= place <= step + self._prefetch]:
            self._maker.give_up(self._jobs.pop(old))
        number = self._number(step)
        index, made = number % len(self._dataset), self._jobs.pop(step).result().decoded()
        for _, reason in broken_in(self._agree(made.reports()), "loading a sample", made.error):
            if index not in self._told and index not in self._dataset.records.bad:
                logger.warning("sample %s is broken and left out: %s", self._dataset.name(index), reason)
            self._told.add(index)
            return LeftOut(number, index, "broken", reason)
        row = made.loaded(number)
        return LeftOut(number, index, "too_long", made.too_long[index]) if row is None else row

    def _number(self, step: int) -> int:
        return step * self._grid.dp + self._grid.coordinates(self._rank).dp

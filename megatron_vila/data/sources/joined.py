"""Several sources as one, their records numbered through; and a range of one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_vila.data.fields import RecordError
from megatron_vila.data.records import Record
from megatron_vila.data.sources.holdings import Holdings
from megatron_vila.data.sources.index import digest_of
from megatron_vila.data.sources.source import Source


class Joined:
    """The records of ``sources``, one source after the other: a ``Source``. One that stands several times is opened once."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *map(len, sources)])
        self.bad = {
            int(start) + index: reason
            for start, source in zip(self._starts, sources, strict=False)
            for index, reason in source.bad.items()
        }
        self.digest = digest_of([source.digest for source in sources])
        self.is_self_contained = all(source.is_self_contained for source in sources)
        self.holdings: Mapping[str, Holdings] = {name: held for s in sources for name, held in s.holdings.items()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> Record:
        source, place = self._place(index)
        return source.record(place)

    def name(self, index: int) -> str:
        source, place = self._place(index)
        return source.name(place)

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], int(index - self._starts[number])


class Part:
    """Records ``first`` to ``end - 1`` of ``source``: a ``Source``. Raises ``RecordError`` if there are none or not as many."""

    def __init__(self, source: Source, first: int, end: int) -> None:
        if not 0 <= first < end <= len(source):
            raise RecordError(
                f"{source.name(0)} and {len(source) - 1} that follow: records {first} to {end} of {len(source)} are no part of "
                "them; change 'subset'"
            )
        self._source, self._first, self._end = source, first, end
        self.bad = {index - first: reason for index, reason in source.bad.items() if first <= index < end}
        self.digest = digest_of([source.digest, first, end])
        self.holdings, self.is_self_contained = source.holdings, source.is_self_contained

    def __len__(self) -> int:
        return self._end - self._first

    def record(self, index: int) -> Record:
        return self._source.record(self._place(index))

    def name(self, index: int) -> str:
        return self._source.name(self._place(index))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._first + index

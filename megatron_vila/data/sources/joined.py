"""Several sources as one: their records one source after the other, a source as often as it is to be seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vila.data.records import Record
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

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int) -> Record:
        source, place = self._place(index)
        return source.record(place)

    def cost(self, index: int) -> int | None:
        source, place = self._place(index)
        return source.cost(place)

    def name(self, index: int) -> str:
        source, place = self._place(index)
        return source.name(place)

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], int(index - self._starts[number])

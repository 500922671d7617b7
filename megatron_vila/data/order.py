"""The order of the samples of a run: a pure function of seed, epoch, index and the weights of a blend.

No number here depends on the layout (tp, pp, dp, ulysses, ring), on the batch size or on what the samples hold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of ``samples`` samples in an epoch: int64 [samples], a permutation.

    A shuffled epoch sorts the samples by a 64-bit hash of (seed, epoch, index) (splitmix64), which stays the same forever,
    unlike the streams of a random number library.
    """
    if not shuffle:
        return np.arange(samples, dtype=np.int64)
    with np.errstate(over="ignore"):
        key = _splitmix64(_splitmix64(np.array([seed], dtype=np.int64).view(np.uint64)) + np.uint64(epoch))
        keys = _splitmix64(key + np.arange(samples, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleOrder:
    """The endless sequence of the samples of a run: which record is instance n = 0, 1, 2 ..., whatever the layout.

    ``sizes`` are the records of each source; records are numbered through, one source after the other. Without ``weights`` every
    record comes once an epoch, all sources shuffled together. With ``weights`` (above 0, one for each source) each source has
    epochs of its own and the share of its weight in every stretch: its k-th sample is due at (k + 1/2) / weight, and samples
    come when they are due. Safe for threads.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shuffle: bool, weights: Sequence[float] = ()) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"an order of samples needs sources with records, got sizes {list(sizes)}")
        if weights and (len(weights) != len(sizes) or not all(0 < weight < math.inf for weight in weights)):
            raise ValueError(f"{len(sizes)} sources need as many weights above 0, got {list(weights)}")
        self.samples = sum(sizes)
        self._sizes = list(sizes) if weights else [self.samples]
        self._weights = np.array(weights or [1.0]) / math.fsum(weights or [1.0])
        self._starts = np.cumsum([0, *self._sizes])
        self._seed, self._shuffle = seed, shuffle
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def epoch(self) -> int:
        """Instances after which each record has come at least once; without weights an epoch."""
        return max(
            math.ceil(size / weight) for size, weight in zip(self._sizes, self._weights.tolist(), strict=True)
        ) + (len(self._sizes) if len(self._sizes) > 1 else 0)

    def records(self, first: int, count: int) -> np.ndarray:
        """The records that are instances ``first`` to ``first + count - 1``: int64 [count]."""
        sources, numbers = self.locate(first, count)
        records = np.empty(count, dtype=np.int64)
        for source, size in enumerate(self._sizes):
            mine = np.flatnonzero(sources == source)
            epochs, places = np.divmod(numbers[mine], size)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                records[mine[of_epoch]] = self._starts[source] + self._order(source, epoch)[places[of_epoch]]
        return records

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of these instances, and how many samples of that source came before: int64 [count] twice."""
        sources = len(self._weights)
        # So many of each source have surely come before instance ``first``: they are due before (first - sources / 2).
        earlier = np.floor(max(0.0, first - sources / 2 - 1) * self._weights + 0.5).astype(np.int64)
        late = first - int(earlier.sum())
        most = np.ceil((late + count + sources + 1) * self._weights).astype(np.int64) + 2
        of = np.repeat(np.arange(sources), most)
        numbers = np.concatenate([start + np.arange(n) for start, n in zip(earlier, most, strict=True)])
        due = (numbers + 0.5) / self._weights[of]
        chosen = np.lexsort((of, due))[late : late + count]
        return of[chosen], numbers[chosen]

    def _order(self, source: int, epoch: int) -> np.ndarray:
        with self._lock:
            if (source, epoch) not in self._orders:
                # A look-ahead reaches over the end of an epoch, so two are kept.
                for old in [key for key in self._orders if key[0] == source and not epoch - 1 <= key[1] <= epoch + 1]:
                    del self._orders[old]
                seed = self._seed if source == 0 else _seed_of(self._seed, source)
                self._orders[source, epoch] = epoch_order(self._sizes[source], seed, epoch, self._shuffle)
            return self._orders[source, epoch]


def _seed_of(seed: int, source: int) -> int:
    """Another seed for each source, so that sources of one length are not shuffled alike."""
    with np.errstate(over="ignore"):
        mixed = _splitmix64(_splitmix64(np.array([seed], dtype=np.int64).view(np.uint64)) ^ np.uint64(source))
    return int(mixed.view(np.int64)[0])

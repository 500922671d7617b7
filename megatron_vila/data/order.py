"""Which samples form which row: pure functions of (seed, epoch, index), the samples' lengths and train.seq_length.

No number here depends on the layout (tp, pp, dp, ulysses, ring) or on the batch size, so row g of a run is the same in all.
"""

from __future__ import annotations

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


def pack_greedily(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Cut samples of ``lengths`` tokens into rows of at most ``seq_length`` tokens, each as full as the order allows.

    Returns the first sample of each row and the end: int64 [rows + 1]. Raises ``ValueError`` for a sample that is too long.
    """
    if len(lengths) and lengths.max() > seq_length:
        raise ValueError(
            f"a sample of {lengths.max()} tokens cannot be packed into rows of train.seq_length={seq_length}"
        )
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        used = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, used + seq_length, side="right")))
    return np.array(starts, dtype=np.int64)


class RowOrder:
    """The endless sequence of rows of a run, epoch after epoch.

    Without ``lengths`` a row holds one sample; with ``lengths`` (int64 [samples], tokens without padding) the samples of each
    epoch are packed in the epoch's order into rows of at most ``seq_length`` tokens. Not safe for threads: ask in one thread.
    """

    def __init__(
        self, samples: int, seed: int, shuffle: bool, lengths: np.ndarray | None = None, seq_length: int | None = None
    ) -> None:
        if samples < 1:
            raise ValueError("a row order needs at least one sample")
        if lengths is not None and (seq_length is None or len(lengths) != samples):
            raise ValueError(
                f"packing needs seq_length and one length per sample, got {len(lengths)} for {samples} samples"
            )
        self.samples, self.seed, self.shuffle, self.lengths, self.seq_length = (
            samples,
            seed,
            shuffle,
            lengths,
            seq_length,
        )
        self._first_rows = [0]
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def row(self, number: int) -> Sequence[int]:
        """Indices of the samples in row ``number`` of the run, in the order in which they are packed."""
        epoch, position = self.locate(number)
        order, starts = self._load(epoch)
        return order[starts[position] : starts[position + 1]].tolist()

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch of row ``number`` of the run, and its place among the rows of that epoch."""
        if self.lengths is None:
            return divmod(number, self.samples)
        while number >= self._first_rows[-1]:
            self._first_rows.append(self._first_rows[-1] + self.rows_of_epoch(len(self._first_rows) - 1))
        epoch = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        return epoch, number - self._first_rows[epoch]

    def rows_of_epoch(self, epoch: int) -> int:
        """Rows of an epoch; with packing it differs from epoch to epoch."""
        return self.samples if self.lengths is None else len(self._load(epoch)[1]) - 1

    def _load(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = epoch_order(self.samples, self.seed, epoch, self.shuffle)
            if self.lengths is None:
                starts = np.arange(self.samples + 1, dtype=np.int64)
            else:
                starts = pack_greedily(self.lengths[order], self.seq_length)
            self._epoch = (epoch, order, starts)
        return self._epoch[1:]

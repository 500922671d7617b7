"""Stage 1 of MM-SP: which rank decodes and encodes which frame (LongVILA section 3.2, by cost instead of by count).

Pure arithmetic on sample metadata, so every rank knows the whole plan without communication.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deal_frames(costs: Sequence[int], ranks: int) -> np.ndarray:
    """Deal frames in contiguous ranges to ``ranks`` encoders.

    ``costs`` are the frames' encoding costs (patches) in row order. Returns boundaries int64 [ranks+1]: encoder e takes
    the frames ``boundaries[e] .. boundaries[e+1]-1``, possibly none. A frame goes to the rank in whose equal share of the
    total cost its middle lies, so no rank exceeds its share by more than one frame's cost; equal costs give counts that
    differ by at most one. Integer arithmetic: the same on every machine.

    Raises ``ValueError`` for ``ranks`` < 1 or a cost < 1.
    """
    if ranks < 1:
        raise ValueError(f"frames need at least one encoder, not {ranks}")
    cost = np.asarray(costs, dtype=np.int64)
    if cost.size == 0:
        return np.zeros(ranks + 1, dtype=np.int64)
    if cost.min() < 1:
        raise ValueError(f"frame {int(cost.argmin())} has cost {int(cost.min())}; a frame costs at least 1")
    end = np.cumsum(cost)
    # Twice the middle of each frame on the cost axis, to stay with integers.
    encoder = (2 * end - cost) * ranks // (2 * end[-1])
    return np.searchsorted(encoder, np.arange(ranks + 1), side="left").astype(np.int64)


def frame_owner(boundaries: np.ndarray) -> np.ndarray:
    """Encoder of each frame, int64 [F], from the boundaries of ``deal_frames``."""
    return np.repeat(np.arange(len(boundaries) - 1, dtype=np.int64), np.diff(boundaries))

"""The wanted frames of a video in slices that can be decoded apart from each other, cut at key frames.

A decoder must go through a group of pictures from its key frame on, so a slice costs the frames of the file that lie on its way,
not the wanted ones. Wherever it is cut, each frame comes out the same to the bit.

Legend: n wanted frames, K key frames of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vila.data.video_info import VideoInfo


@dataclass(frozen=True)
class Slice:
    """The wanted frames ``first`` to ``last`` (places in their list, without the latter); they cost ``frames`` of the file."""

    first: int
    last: int
    frames: int


def slices(info: VideoInfo, indices: Sequence[int], target: float) -> Iterator[Slice]:
    """Slices of the ascending frames ``indices`` of about ``target`` frames of the file, in their order.

    A file that can only be read from its start is one slice.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if not len(wanted):
        return
    keys = _key_frames(info)
    if keys is None:
        yield Slice(0, len(wanted), int(wanted[-1]) + 1)
        return
    key = keys[np.maximum(np.searchsorted(keys, wanted, side="right") - 1, 0)]
    begins = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    ends = np.append(begins[1:], len(wanted))
    costs = wanted[ends - 1] - np.minimum(key[begins], wanted[begins]) + 1
    first, cost = 0, 0
    for end, more in zip(ends.tolist(), costs.tolist(), strict=True):
        cost += more
        if cost >= target or end == len(wanted):
            yield Slice(first, end, cost)
            first, cost = end, 0


def _key_frames(info: VideoInfo) -> np.ndarray | None:
    """The key frames by their place in the order of time (int64 [K], ascending); None if a decoder cannot start at them."""
    if not info.has_pts or (len(info.skipped) > 1 and (info.key_places < 0).any()):
        return None
    bounds = np.searchsorted(info.key_parts, np.arange(len(info.parts)))
    places = [
        first + np.searchsorted(info.pts[first:last], info.key_pts[begin:end])
        for first, last, begin, end in zip(info.parts[:-1], info.parts[1:], bounds[:-1], bounds[1:], strict=True)
    ]
    return np.unique(np.concatenate(places)) if places else None

"""What ``attend_cached`` is given, and how its queries and keys are dealt to blocks of a GPU, once for many calls.

A *slot* is a share of the keys of one part, for a group of at most M of its queries, in each of the K key/value heads. Every
slot writes M partial results; each query finds its own in ``found`` and merges them.

Legend: B rows, H query heads, K key/value heads, R = H/K, D head dim, U keys that a part has room for; S slots, M queries of a
slot, E partial results of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch


class Cached(NamedTuple):
    """Keys and values of one part. The first ``length`` tokens count; what stands behind them is never read as a number."""

    k_UKD: torch.Tensor
    v_UKD: torch.Tensor
    k_scale_UK: torch.Tensor | None
    """float32: key = ``k_UKD`` times this, for ``float8_e4m3fn``; else None"""
    v_scale_UK: torch.Tensor | None
    length: torch.Tensor
    """int32 [1] on the device of the keys; read when the work runs, so that a captured CUDA graph sees it grow"""
    most: int
    """What ``length`` does not exceed as long as this call, or the graph that captured it, is in use."""


Part = tuple[Cached, tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    slots_S5: np.ndarray
    """int32: part, split, splits of the part, first of the slot's queries in ``queries``, number of its queries"""
    queries: np.ndarray
    """int32: place of each group's queries in [B, H] for key/value head 0; head k's are R k further"""
    found_BRE: np.ndarray
    """int32 [B, R, E]: places in [S, M] of the partial results of query r of a row; only the first ``count_BR`` count"""
    count_BR: np.ndarray


def deal_keys(most: Sequence[int], budget: int, least_keys: int) -> tuple[int, ...]:
    """Into how many splits the keys of each part are cut: about ``budget`` in all, by the parts' share of the keys.

    ``most``: upper bounds of the lengths, taken as the next power of two, so that a growing part is seldom dealt anew. No split
    has fewer than ``least_keys`` keys while a part is as long as that. The device cuts by the true length.
    """
    rounded = [1 << max(n - 1, 0).bit_length() for n in most]
    return tuple(max(1, min(budget * n // sum(rounded), n // least_keys)) for n in rounded)


@lru_cache(maxsize=64)
def deal_work(
    rows: tuple[tuple[int, ...], ...], splits: tuple[int, ...], batch: int, heads: int, kv_heads: int, tile: int
) -> Work:
    """The slots of parts with these rows and splits, for ``batch`` rows and at most ``tile`` queries a slot."""
    group = heads // kv_heads
    slots: list[tuple[int, ...]] = []
    queries: list[int] = []
    found: list[list[int]] = [[] for _ in range(batch * group)]
    # Parts of few splits, which are short, come first: where the GPU is full, only little work waits for them.
    for part in sorted(range(len(rows)), key=lambda part: splits[part]):
        own = [(row, r) for row in rows[part] for r in range(group)]
        tiles = [own[start : start + tile] for start in range(0, len(own), tile)]
        # Tiles that read the same keys stand side by side, so that all but one find them in the GPU's cache.
        for number, chosen in enumerate(tiles):
            for m, (row, r) in enumerate(chosen):
                places = range(len(slots) + number, len(slots) + len(tiles) * splits[part], len(tiles))
                found[row * group + r] += [slot * tile + m for slot in places]
        starts = range(len(queries), len(queries) + len(own), tile)
        queries += [row * heads + r for row, r in own]
        slots += [
            (part, split, splits[part], first, len(chosen))
            for split in range(splits[part])
            for first, chosen in zip(starts, tiles, strict=True)
        ]
    table = np.zeros((batch, group, max(1, *map(len, found))), np.int32)
    for index, places_found in enumerate(found):
        table[index // group, index % group, : len(places_found)] = places_found
    return Work(
        slots_S5=np.array(slots, np.int32).reshape(-1, 5),
        queries=np.array(queries, np.int32),
        found_BRE=table,
        count_BR=np.array([len(x) for x in found], np.int32).reshape(batch, group),
    )

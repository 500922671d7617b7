"""The process grid as plain arithmetic: which rank stands where and which ranks share a group.

Megatron-Core's rank order ``tp-cp-ep-dp-pp`` with cp = ulysses x ring and ulysses innermost:
``rank = t + tp * (u + ulysses * (r + ring * (d + dp * p)))``. No process is needed to ask these questions; the trainer,
``explain`` and the tests use the same class.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.errors import SettingError


class Coordinates(NamedTuple):
    """Place of a rank on each axis of the grid."""

    tp: int
    ulysses: int
    ring: int
    dp: int
    pp: int


AXES_OF_KIND = {
    "tp": ("tp",),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "cp": ("ulysses", "ring"),
    "tp_cp": ("tp", "ulysses", "ring"),
    "dp": ("dp",),
    "dp_cp": ("ulysses", "ring", "dp"),
    "pp": ("pp",),
    "block": ("tp", "ulysses", "ring", "pp"),
}
"""Groups by what varies inside: ``tp_cp`` shares one sample's frames, ``block`` (tp, cp and pp) shares one sample."""


class Layout(NamedTuple):
    """Sizes of the model-parallel axes; data parallelism takes the rest of the world."""

    tp: int
    pp: int
    ulysses: int
    ring: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Layout:
        return cls(parallel.tp, parallel.pp, parallel.ulysses, parallel.ring)

    @property
    def cp(self) -> int:
        return self.ulysses * self.ring

    @property
    def size(self) -> int:
        """Ranks that share one sample."""
        return self.tp * self.pp * self.cp

    def world_problem(self, world_size: int) -> str | None:
        """Why ``world_size`` ranks do not form whole replicas, with world sizes that do; None if they do."""
        if world_size >= 1 and world_size % self.size == 0:
            return None
        below = world_size // self.size * self.size
        worlds = " or ".join(str(n) for n in (below, below + self.size) if n > 0)
        return (
            f"world size {world_size} is not a multiple of tp*pp*ulysses*ring = "
            f"{self.tp}*{self.pp}*{self.ulysses}*{self.ring} = {self.size}; start {worlds} processes"
        )

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} ulysses={self.ulysses} ring={self.ring}"


@dataclass(frozen=True)
class GridShape:
    """Sizes of the five axes. ``GridShape.of`` derives dp from a world size."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    dp: int = 1
    pp: int = 1

    @classmethod
    def of(cls, world_size: int, tp: int = 1, pp: int = 1, ulysses: int = 1, ring: int = 1) -> GridShape:
        """The grid of ``world_size`` ranks; raises ``SettingError`` if the sizes, each at least 1, do not divide it."""
        layout = Layout(tp, pp, ulysses, ring)
        assert min(layout) >= 1, layout
        if problem := layout.world_problem(world_size):
            raise SettingError(problem)
        return cls(tp=tp, ulysses=ulysses, ring=ring, dp=world_size // layout.size, pp=pp)

    @property
    def cp(self) -> int:
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def encoders(self) -> int:
        """Ranks of one block's first pipeline stage: those that encode frames."""
        return self.tp * self.cp

    @property
    def document_multiple(self) -> int:
        """Every document of a row is padded to a multiple of this (2*cp zigzag chunks)."""
        return 2 * self.cp

    @property
    def row_multiple(self) -> int:
        """Every row is padded to a multiple of this (zigzag chunks, then Megatron sequence parallelism)."""
        return 2 * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a grid of {self.world_size}")
        place = []
        for size in (self.tp, self.ulysses, self.ring, self.dp, self.pp):
            place.append(rank % size)
            rank //= size
        return Coordinates(*place)

    def rank(self, tp: int = 0, ulysses: int = 0, ring: int = 0, dp: int = 0, pp: int = 0) -> int:
        return tp + self.tp * (ulysses + self.ulysses * (ring + self.ring * (dp + self.dp * pp)))

    def cp_rank(self, rank: int) -> int:
        place = self.coordinates(rank)
        return place.ulysses + self.ulysses * place.ring

    def encoder_rank(self, rank: int) -> int:
        """Index of ``rank`` among the tp*cp ranks of its block and pipeline stage (tp varies fastest)."""
        return self.coordinates(rank).tp + self.tp * self.cp_rank(rank)

    def group(self, kind: str, rank: int) -> list[int]:
        """The ranks of the ``kind`` group (AXES_OF_KIND) that holds ``rank``, ascending."""
        axes, mine = AXES_OF_KIND[kind], self.coordinates(rank)._asdict()
        places = itertools.product(*(range(getattr(self, axis)) for axis in axes))
        return sorted(self.rank(**mine | dict(zip(axes, place, strict=True))) for place in places)

    def groups(self, kind: str) -> list[list[int]]:
        """All groups of a kind, ordered by their first rank."""
        axes = ("pp", "dp", "ring", "ulysses", "tp")  # the outermost first
        ranks = np.arange(self.world_size).reshape([getattr(self, axis) for axis in axes])
        inner = [n for n, axis in enumerate(axes) if axis in AXES_OF_KIND[kind]]
        grouped = np.moveaxis(ranks, inner, range(-len(inner), 0))
        return grouped.reshape(-1, math.prod(getattr(self, axes[n]) for n in inner)).tolist()

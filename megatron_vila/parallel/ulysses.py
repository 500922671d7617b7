"""The inner level of 2D attention: an all-to-all that trades sequence for heads (DeepSpeed Ulysses) and back.

Query heads are split evenly over the U ranks of the Ulysses group. Key/value heads go only where their query heads are:
when U exceeds or does not divide their number, a head is sent to each rank that needs it and its gradients are summed at
home. q, k and v travel in one collective.

Legend: s local tokens (S/cp), T = U*s tokens after the exchange, H query heads, K key/value heads, h = H/U query heads
and k key/value heads of a rank after the exchange, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each rank of a Ulysses group works on. Pure arithmetic.

    Raises ``ValueError`` if ``ulysses`` does not divide the query heads.
    """

    heads: int
    kv_heads: int
    ulysses: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key/value heads do not divide {self.heads} query heads")
        if self.heads % self.ulysses:
            works = [u for u in range(2, self.heads + 1) if self.heads % u == 0 and u <= 2 * self.ulysses]
            raise ValueError(
                f"ulysses={self.ulysses} does not divide {self.heads} query heads (per tensor-parallel rank); use ulysses="
                f"{' or '.join(map(str, works)) or 1} and put the rest of cp into the ring"
            )

    @property
    def per_rank(self) -> int:
        """Query heads of a rank after the exchange."""
        return self.heads // self.ulysses

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def kv_range(self, rank: int) -> range:
        """Key/value heads that ``rank`` needs."""
        first = rank * self.per_rank
        return range(first // self.group, (first + self.per_rank - 1) // self.group + 1)

    def expansion(self, rank: int) -> list[int] | None:
        """Index into ``kv_range(rank)`` for each kernel key/value head, or None if they are the range itself.

        Kernels share a key/value head among equally many query heads. Where the split cuts a group unevenly, runs of
        gcd(h, H/K) query heads get their own (repeated) key/value head.
        """
        run = gcd(self.per_rank, self.group)
        mine = self.kv_range(rank)
        index = [(rank * self.per_rank + i) // self.group - mine.start for i in range(0, self.per_rank, run)]
        return None if index == list(range(len(mine))) else index


@dataclass(frozen=True)
class Ulysses:
    """The exchange between sequence shards and head shards over ``group``.

    ``order`` permutes received tokens (``layout.ulysses_permutation``) and ``inverse`` undoes it; both int64 [T] on the
    device, None when U = 1.
    """

    split: HeadSplit
    rank: int
    group: dist.ProcessGroup

    @cached_property
    def _kv_ranges(self) -> list[range]:
        return [self.split.kv_range(u) for u in range(self.split.ulysses)]

    def to_heads(self, q_sHD: torch.Tensor, k_sKD: torch.Tensor, v_sKD: torch.Tensor, order: torch.Tensor | None):
        """q [s, H, D], k and v [s, K, D] to q [T, h, D], k and v [T, k, D]. All-to-all over the Ulysses group."""
        if self.split.ulysses == 1:
            return q_sHD, k_sKD, v_sKD
        heads, mine = self.split.per_rank, len(self._kv_ranges[self.rank])
        pieces = [
            (q_sHD[:, u * heads : (u + 1) * heads], k_sKD[:, kv.start : kv.stop], v_sKD[:, kv.start : kv.stop])
            for u, kv in enumerate(self._kv_ranges)
        ]
        received = self._exchange(pieces, [heads + 2 * mine] * self.split.ulysses)
        buffer = received.view(-1, heads + 2 * mine, q_sHD.shape[-1])
        return tuple(part.index_select(0, order) for part in buffer.split([heads, mine, mine], dim=1))

    def to_sequence(self, out_ThD: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
        """Attention output [T, h, D] to [s, H, D]. All-to-all over the Ulysses group."""
        if self.split.ulysses == 1:
            return out_ThD
        # In sequence order the tokens of each rank stand together: this is the buffer to send.
        sent = out_ThD.index_select(0, inverse)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received.unflatten(0, (self.split.ulysses, -1)).transpose(0, 1).flatten(1, 2)

    def outputs_to_heads(self, tensors_sHD: Sequence[torch.Tensor], order: torch.Tensor | None) -> list[torch.Tensor]:
        """Each of ``tensors_sHD`` (the output's gradient, the output) [s, H, D] to [T, h, D]: the adjoint of ``to_sequence``.

        One all-to-all over the Ulysses group.
        """
        if self.split.ulysses == 1:
            return list(tensors_sHD)
        heads, count = self.split.per_rank, len(tensors_sHD)
        pieces = [tuple(x[:, u * heads : (u + 1) * heads] for x in tensors_sHD) for u in range(self.split.ulysses)]
        received = self._exchange(pieces, [count * heads] * self.split.ulysses)
        buffer = received.view(-1, count * heads, tensors_sHD[0].shape[-1])
        return [part.index_select(0, order) for part in buffer.split([heads] * count, dim=1)]

    def grads_to_sequence(
        self, dq_ThD: torch.Tensor, dk_TkD: torch.Tensor, dv_TkD: torch.Tensor, inverse: torch.Tensor | None
    ):
        """Gradients dq, dk, dv back to [s, H, D], [s, K, D], [s, K, D]; replicated heads are summed at home."""
        if self.split.ulysses == 1:
            return dq_ThD, dk_TkD, dv_TkD
        heads = self.split.per_rank
        grads = [x.index_select(0, inverse) for x in (dq_ThD, dk_TkD, dv_TkD)]
        shares = self._return(grads, [heads + 2 * len(kv) for kv in self._kv_ranges])
        tokens = dq_ThD.shape[0] // self.split.ulysses
        dq = dq_ThD.new_empty(tokens, self.split.heads, dq_ThD.shape[-1])
        dk = dk_TkD.new_zeros(tokens, self.split.kv_heads, dk_TkD.shape[-1])
        dv = torch.zeros_like(dk)
        for u, (share, kv) in enumerate(zip(shares, self._kv_ranges, strict=True)):
            dq_part, dk_part, dv_part = share.split([heads, len(kv), len(kv)], dim=1)
            dq[:, u * heads : (u + 1) * heads] = dq_part
            dk[:, kv.start : kv.stop] += dk_part
            dv[:, kv.start : kv.stop] += dv_part
        return dq, dk, dv

    def _return(self, parts: list[torch.Tensor], widths: list[int]) -> list[torch.Tensor]:
        """Send each rank its tokens of ``parts`` (all my heads); receive ``widths[u]`` heads of mine from rank u."""
        tokens = parts[0].shape[0] // self.split.ulysses
        pieces = [tuple(p[u * tokens : (u + 1) * tokens] for p in parts) for u in range(self.split.ulysses)]
        flat = self._exchange(pieces, widths)
        sizes = [tokens * width * parts[0].shape[-1] for width in widths]
        return [share.view(tokens, width, -1) for share, width in zip(flat.split(sizes), widths, strict=True)]

    def _exchange(self, pieces: Sequence[tuple[torch.Tensor, ...]], recv_heads: list[int]) -> torch.Tensor:
        """All-to-all: ``pieces[u]`` are [n, *, D] tensors for rank u, joined over heads; n is the same for all ranks.

        Returns the received values as one flat tensor, ``recv_heads[u]`` heads of n tokens from rank u.
        """
        example = pieces[0][0]
        tokens, dim = example.shape[0], example.shape[2]
        sent = [tokens * sum(p.shape[1] for p in piece) * dim for piece in pieces]
        buffer = example.new_empty(sum(sent))
        for part, piece in zip(buffer.split(sent), pieces, strict=True):
            torch.cat(piece, dim=1, out=part.view(tokens, -1, dim))
        received = [tokens * heads * dim for heads in recv_heads]
        out = example.new_empty(sum(received))
        dist.all_to_all_single(out, buffer, received, sent, group=self.group)
        return out

"""The inner level of 2D attention: an all-to-all that trades sequence for heads (DeepSpeed Ulysses) and back.

Query heads are split evenly over the U ranks of the Ulysses group. Key/value heads go only where their query heads are. When
U exceeds or does not divide their number, a head is sent to each rank that needs it, and its gradients are summed on the ranks
from which its tokens came. q, k and v travel in one collective.

The heads of a rank may travel in several chunks, one while the attention of another is computed. Then exchanges hide behind the
work, and their copies exist for one chunk at a time. An exchange is returned as a ``Pending``, which is over already if there
are no chunks.

Legend: s local tokens (S/cp), T = U*s tokens after the exchange, H query heads, K key/value heads, h query heads and k key/value
heads of a chunk of a rank (h = H/U without chunks), D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from megatron_vila.parallel.peers import Arrival, PeerMemory
from megatron_vila.plan.heads import HeadSplit


class Pending:
    """An exchange that has been started, or is over (``work`` is None). ``wait``, called once, returns what has arrived."""

    def __init__(
        self, finish: Callable[[], Any], work: dist.Work | Arrival | None = None, sent: torch.Tensor | None = None
    ) -> None:
        self._finish, self._work = finish, work
        self._sent = None if work is None else sent  # lives until it has left
        if work is None:
            # Memory that others write into is read now: the next exchange may come before ``wait``.
            arrived = finish()
            self._finish = lambda: arrived

    def wait(self) -> Any:
        if self._work is not None:
            self._work.wait()
        # A finished ``work`` may keep the memory of what it moved.
        finish = self._finish
        del self._finish, self._work, self._sent
        return finish()


@dataclass(frozen=True)
class Ulysses:
    """The exchange between sequence shards and head shards over ``group``, chunk by chunk of ``split``.

    ``order`` permutes received tokens (``tokens.ulysses_permutation``) and ``inverse`` undoes it; both int64 [T] on the
    device, empty when U = 1, where nothing travels and there is one chunk. With ``peers`` the ranks write into each other's
    memory instead of calling NCCL or gloo, if there is one chunk.
    """

    split: HeadSplit
    rank: int
    group: dist.ProcessGroup
    peers: PeerMemory | None = None

    @cached_property
    def _query_ranges(self) -> list[list[range]]:
        return [[self.split.query_range(u, c) for u in range(self.split.ulysses)] for c in range(self.split.chunks)]

    @cached_property
    def _kv_ranges(self) -> list[list[range]]:
        return [[self.split.kv_range(u, c) for u in range(self.split.ulysses)] for c in range(self.split.chunks)]

    def to_heads(
        self, q_sHD: torch.Tensor, k_sKD: torch.Tensor, v_sKD: torch.Tensor, order: torch.Tensor, chunk: int
    ) -> Pending:
        """q [s, H, D], k and v [s, K, D] to q [T, h, D], k and v [T, k, D]. All-to-all over the Ulysses group."""
        if self.split.ulysses == 1:
            return Pending(lambda: (q_sHD, k_sKD, v_sKD))
        ranges = list(zip(self._query_ranges[chunk], self._kv_ranges[chunk], strict=True))
        widths = [len(q) + 2 * len(kv) for q, kv in ranges]
        heads, mine = (len(part) for part in ranges[self.rank])

        def fill(u, out_swD):
            q, kv = ranges[u]
            parts = q_sHD[:, q.start : q.stop], k_sKD[:, kv.start : kv.stop], v_sKD[:, kv.start : kv.stop]
            _join_heads(parts, out_swD)

        received, work, sent = self._exchange(fill, [widths] * self.split.ulysses, q_sHD)

        def finish():
            buffer = received.view(-1, heads + 2 * mine, q_sHD.shape[-1])
            return tuple(take_rows(part, order) for part in buffer.split([heads, mine, mine], dim=1))

        return Pending(finish, work, sent)

    def to_sequence(self, out_ThD: torch.Tensor, inverse: torch.Tensor, out_sHD: torch.Tensor, chunk: int) -> Pending:
        """Attention output [T, h, D] into the heads of its chunk of ``out_sHD`` [s, H, D]. All-to-all over the Ulysses group."""

        def fill(u, out_shD):
            take_rows(out_ThD, self._tokens_of(u, inverse), out_shD)

        widths = [[out_ThD.shape[1]] * self.split.ulysses] * self.split.ulysses
        received, work, sent = self._exchange(fill, widths, out_sHD)

        def finish():
            # heads by rank, then by chunk
            mine = out_sHD.unflatten(1, (self.split.ulysses, self.split.chunks, -1))[:, :, chunk]
            copy_vectors(mine, received.view(self.split.ulysses, -1, *out_ThD.shape[1:]).transpose(0, 1))

        return Pending(finish, work, sent)

    def outputs_to_heads(
        self, tensors_sHD: Sequence[torch.Tensor], order: torch.Tensor, inverse: torch.Tensor, chunk: int
    ) -> Pending:
        """Each of ``tensors_sHD`` (the output's gradient, the output) [s, H, D] to [T, h, D]: the adjoint of ``to_sequence``.

        One all-to-all over the Ulysses group. What comes by ``peers`` is not copied: after the next exchange has begun, ``wait``
        raises ``RuntimeError``.
        """
        if self.split.ulysses == 1:
            return Pending(lambda: list(tensors_sHD))
        ranges, count, like = self._query_ranges[chunk], len(tensors_sHD), tensors_sHD[0]
        heads, dim = len(ranges[self.rank]), like.shape[-1]
        shape = (self.split.ulysses * len(like), heads, dim)
        if peers := self._free_peers(count * math.prod(shape), like):
            # They are needed for this chunk's attention only: each rank writes them to their place in its order.
            def arrived(u):
                return [peers.view(u, i * math.prod(shape), shape, like.dtype) for i in range(count)]

            def write(u):
                for x, there in zip(tensors_sHD, arrived(u), strict=True):
                    put_rows(x[:, ranges[u].start : ranges[u].stop], self._tokens_of(self.rank, inverse), there)

            self._write_to_all(write, peers)
            return Pending(lambda: arrived(self.rank), peers.arrival())

        def fill(u, out_swD):
            _join_heads([x[:, ranges[u].start : ranges[u].stop] for x in tensors_sHD], out_swD)

        received, work, sent = self._collective(fill, [[count * heads] * self.split.ulysses] * self.split.ulysses, like)

        def finish():
            buffer = received.view(-1, count * heads, dim)
            return [take_rows(part, order) for part in buffer.split([heads] * count, dim=1)]

        return Pending(finish, work, sent)

    def grads_to_sequence(
        self,
        grads_TxD: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        inverse: torch.Tensor,
        totals_sXD: tuple[torch.Tensor, ...],
        chunk: int,
    ) -> Pending:
        """Gradients dq, dk, dv of a chunk into ``totals_sXD`` [s, H, D], [s, K, D], [s, K, D], where those of a key/value head
        from several ranks are summed. All-to-all over the Ulysses group."""
        queries, kv_ranges = self._query_ranges[chunk], self._kv_ranges[chunk]
        heads, dim = len(queries[self.rank]), totals_sXD[0].shape[-1]
        sizes = [(heads, len(kv), len(kv)) for kv in kv_ranges]

        def fill(u, out_swD):
            for x, place in zip(grads_TxD, out_swD.split(sizes[self.rank], dim=1), strict=True):
                take_rows(x, self._tokens_of(u, inverse), place)

        widths = [[sum(size)] * self.split.ulysses for size in sizes]
        received, work, sent = self._exchange(fill, widths, totals_sXD[0])

        def finish():
            dq, *others = totals_sXD
            tokens, seen = len(dq), 0
            shares = received.split([tokens * sum(size) * dim for size in sizes])
            for share, size, q, kv in zip(shares, sizes, queries, kv_ranges, strict=True):
                dq_part, *parts = share.view(tokens, -1, dim).split(size, dim=1)
                copy_vectors(dq[:, q.start : q.stop], dq_part)
                replicated = max(seen - kv.start, 0)
                for total, part in zip(others, parts, strict=True):
                    total[:, kv.start : kv.start + replicated] += part[:, :replicated]
                    copy_vectors(total[:, kv.start + replicated : kv.stop], part[:, replicated:])
                seen = kv.stop

        return Pending(finish, work, sent)

    def _tokens_of(self, rank: int, inverse: torch.Tensor) -> torch.Tensor:
        """Where the tokens of ``rank`` stand in attention's order."""
        count = len(inverse) // self.split.ulysses
        return inverse[rank * count : (rank + 1) * count]

    def _exchange(
        self, fill: Callable[[int, torch.Tensor], None], widths: Sequence[Sequence[int]], like_sXD: torch.Tensor
    ) -> tuple[torch.Tensor, dist.Work | None, torch.Tensor | None]:
        """Start an all-to-all: rank a sends ``widths[a][b]`` heads of each of its s tokens to rank b. ``fill(u, out)`` writes
        what goes to rank u into ``out`` [s, width, D].

        Returns where the values arrive, one flat tensor, those of rank 0 first; the transfer, or None if it is over; and what is
        sent. Memory of ``peers`` is written again by the next exchange.
        """
        tokens, dim, ranks = len(like_sXD), like_sXD.shape[-1], range(self.split.ulysses)
        most = max(sum(widths[a][b] for a in ranks) for b in ranks)
        peers = self._free_peers(tokens * most * dim, like_sXD)
        if peers is None:
            return self._collective(fill, widths, like_sXD)

        def write(u):
            first = tokens * dim * sum(widths[a][u] for a in range(self.rank))
            fill(u, peers.view(u, first, (tokens, widths[self.rank][u], dim), like_sXD.dtype))

        self._write_to_all(write, peers)
        total = tokens * dim * sum(widths[a][self.rank] for a in ranks)
        return peers.view(self.rank, 0, (total,), like_sXD.dtype), None, None

    def _collective(
        self, fill: Callable[[int, torch.Tensor], None], widths: Sequence[Sequence[int]], like_sXD: torch.Tensor
    ) -> tuple[torch.Tensor, dist.Work | None, torch.Tensor]:
        """``_exchange`` by NCCL or gloo."""
        tokens, dim = len(like_sXD), like_sXD.shape[-1]
        sent = [tokens * width * dim for width in widths[self.rank]]
        received = [tokens * width[self.rank] * dim for width in widths]
        buffer, out = (like_sXD.new_empty(sum(sizes)) for sizes in (sent, received))
        for u, part in enumerate(buffer.split(sent)):
            fill(u, part.view(tokens, -1, dim))
        return out, dist.all_to_all_single(out, buffer, received, sent, group=self.group, async_op=self.split.chunks > 1), buffer

    def _free_peers(self, elements: int, like: torch.Tensor) -> PeerMemory | None:
        """``peers`` if they are used for an exchange in which a rank gets up to ``elements``, else None.

        Their buffers are free: all ranks have read the exchange before.
        """
        if self.peers is None or self.split.chunks > 1 or not self.peers.reserve(elements * like.element_size()):
            return None
        self.peers.barrier()
        return self.peers

    def _write_to_all(self, write: Callable[[int], None], peers: PeerMemory) -> None:
        """``write(u)`` for every rank u, from the next one on, so that the ranks do not all write to the same one at a time.

        Then wait until the others have written.
        """
        with peers.beside():
            for step in range(1, self.split.ulysses):
                write((self.rank + step) % self.split.ulysses)
        write(self.rank)
        peers.barrier()


def as_vectors(x: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 16 bytes, where its layout allows it: copies then move whole vectors."""
    strides = (x.storage_offset(), *x.stride()[:-1], x.shape[-1])
    whole = x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in strides)
    return x.view(torch.complex128) if whole else x


def copy_vectors(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)``, in whole vectors where both allow it."""
    target, source = _in_vectors(target, source)
    target.copy_(source)


def take_rows(source: torch.Tensor, index: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """``source[index]``, into ``target`` if it is given, in whole vectors where both allow it."""
    target = source.new_empty(len(index), *source.shape[1:]) if target is None else target
    wide_target, source = _in_vectors(target, source)
    torch.index_select(source, 0, index, out=wide_target)
    return target


def put_rows(source: torch.Tensor, index: torch.Tensor, target: torch.Tensor) -> None:
    """``target[index] = source``, in whole vectors where both allow it."""
    target, source = _in_vectors(target, source)
    target.index_copy_(0, index, source)


def _in_vectors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``as_vectors`` of all or of none; they have one dtype."""
    wide = tuple(map(as_vectors, tensors))
    return wide if len({x.dtype for x in wide}) == 1 else tensors


def _join_heads(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """``parts`` [n, *, D] side by side into ``out`` [n, sum of *, D]."""
    for part, place in zip(parts, out.split([part.shape[1] for part in parts], dim=1), strict=True):
        copy_vectors(place, part)

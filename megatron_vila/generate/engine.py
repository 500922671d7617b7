"""The engine: reads a prompt once, keeps what it has read, and answers questions about it.

A prompt up to the end of its last frame becomes a ``Prefix``, read in chunks. A question is the tail of a prompt. Any number of
them, about the same prefix or different ones, is answered in one batch. All ranks call the same methods with the same arguments.

Legend: B questions of a batch, F frames, N visual tokens made here, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila import accelerator
from megatron_vila.config.schema import Config
from megatron_vila.errors import SettingError
from megatron_vila.generate.frames import PictureSource
from megatron_vila.generate.graph import GraphedStep
from megatron_vila.generate.runner import Chunk, Piece, Runner, TokenStep
from megatron_vila.generate.sampling import Sampling, choose
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.cache import FP8, Span, SpanShape, Tails
from megatron_vila.parallel.cached_attention import Observer
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.chunks import cut, part, prefix_tokens, tokens_of_chunk
from megatron_vila.plan.row import IGNORE, Document

AHEAD = 3
"""Chunks whose frames are decoded ahead."""

CACHE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64, "fp8": FP8}

Progress = Callable[[int, int, int], None]
"""Gets tokens and frames that are read, and the tokens of all."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The beginning of prompts, read: ``document`` up to the end of its last frame, ``tokens`` long. ``key`` tells prefixes of
    one model apart (``frames.document_key``)."""

    document: Document
    span: Span
    key: str
    tokens: int


@dataclass(frozen=True)
class Request:
    """A question: the token ids (int64, at least one) that follow ``prefix``, or begin a prompt without frames."""

    prefix: Prefix | None
    tail: np.ndarray

    @property
    def start(self) -> int:
        return 0 if self.prefix is None else self.prefix.tokens

    @property
    def spans(self) -> tuple[Span, ...]:
        return () if self.prefix is None else (self.prefix.span,)


@dataclass(frozen=True)
class Answer:
    """``token_ids`` without the one that stopped it; ``stopped_by`` is "stop" or "length". ``first_token_s`` seconds passed up to
    its first token, and ``decode_s`` in the steps of the whole batch after that."""

    token_ids: np.ndarray
    stopped_by: str
    first_token_s: float
    decode_s: float


class Engine:
    """``model`` in eval mode on ``topology``, ready to answer.

    ``cache_dtype`` is auto (that of the model), bf16, fp32, fp64 or fp8. ``chunk_tokens`` are read at once by all ranks together
    (0: chosen). Raises ``SettingError``.
    """

    def __init__(
        self,
        model: VilaModel,
        topology: ParallelTopology,
        config: Config,
        *,
        cache_dtype: str = "auto",
        chunk_tokens: int = 0,
    ) -> None:
        self.topology, self.config = topology, config
        self.runner = Runner(model.eval(), topology, config.model.llm)
        self.device, self.dtype = self.runner.device, self.runner.dtype
        self.cache_dtype = cache_dtype_of(cache_dtype, self.dtype)
        self.chunk_tokens = tokens_of_chunk(chunk_tokens, topology.grid)
        self._cuda = accelerator.cuda()
        self._prefixes: weakref.WeakValueDictionary[str, Prefix] = weakref.WeakValueDictionary()

    @property
    def span_shape(self) -> SpanShape:
        return self.runner.span_shape

    @property
    def scale(self) -> float:
        """What multiplies the products of queries and keys."""
        return self.runner.attention.attention.ring.scale

    def split(self, prompt: Document) -> tuple[Document | None, np.ndarray]:
        """A prompt as the document that becomes a ``Prefix`` (None without frames) and the tail of a ``Request``."""
        end = prefix_tokens(prompt)
        (chunk,) = cut(prompt, max(end, 1), stop=end) or (None,)
        return None if chunk is None else part(prompt, chunk), prompt.token_ids[end:]

    def prefill(
        self,
        document: Document,
        pictures: PictureSource,
        key: str,
        progress: Progress | None = None,
        *,
        instead_of: Prefix | None = None,
    ) -> Prefix:
        """Read ``document`` (of ``split``), which ``key`` identifies; at once if somebody still holds the prefix of this key.

        ``instead_of`` is a prefix that nobody asks any more: its memory is used again if there is enough, and the chunks that it
        and ``document`` begin with are not read again. Files that both name are taken to be the same.

        Frames are decoded and encoded under the layers of the chunk before. Collective, as ``Runner.read``.
        """
        held = self.held(key)
        if held is not None:
            return held
        pieces = [(part(document, chunk), chunk.first) for chunk in cut(document, self.chunk_tokens)]
        if instead_of is not None and self.has_room(instead_of, document):
            span, known = instead_of.span, self._common(instead_of, pieces)
        else:
            room = self._room([len(piece) for piece, _ in pieces])
            span, known = Span.empty(self.span_shape, room, self.cache_dtype, self.device), 0
        chunks = [self.runner.plan([Piece(piece, first, (span,), span)]) for piece, first in pieces[known:]]
        events, frames = [], sum(frame.unit.frames for piece, _ in pieces[:known] for frame in piece.frames)
        for number, chunk in enumerate(chunks):
            for coming in range(number, min(number + AHEAD + 1, len(chunks))):
                pictures.start(coming, chunks[coming].plan)
            self.runner.read(chunk, pictures.tokens(number, chunk.plan))
            events.append(self._cuda.Event())
            events[-1].record()
            if number:  # the device has the next chunk to do meanwhile
                frames += self._tell(events[number - 1], chunks[number - 1], len(document), frames, progress)
        if chunks:
            self._tell(events[-1], chunks[-1], len(document), frames, progress)
        prefix = Prefix(document, span, key, len(document))
        self._prefixes[key] = prefix
        return prefix

    def has_room(self, prefix: Prefix, document: Document) -> bool:
        """Whether ``document`` can be read ``instead_of`` a prefix."""
        return prefix.span.capacity >= self._room([len(chunk) for chunk in cut(document, self.chunk_tokens)])

    def _common(self, prefix: Prefix, pieces: Sequence[tuple[Document, int]]) -> int:
        """How many of the chunks ``pieces`` (with their places) ``prefix`` begins with. Its span keeps these alone."""
        self._prefixes.pop(prefix.key, None)
        known, stop = 0, 0
        for chunk, (piece, first) in zip(cut(prefix.document, self.chunk_tokens), pieces, strict=False):
            if not _alike(part(prefix.document, chunk), piece):
                break
            known, stop = known + 1, first + len(piece)
        # Chunks were kept one after the other.
        prefix.span.shorten(int((prefix.span.positions < stop).sum()))
        return known

    def _tell(self, event, chunk: Chunk, tokens: int, frames: int, progress: Progress | None) -> int:
        """Wait until a chunk is read, and say so; its frames."""
        event.synchronize()
        (piece,) = chunk.pieces
        count = sum(frame.unit.frames for frame in piece.document.frames)
        if progress is not None:
            progress(piece.start + len(piece.document), frames + count, tokens)
        return count

    def held(self, key: str) -> Prefix | None:
        """The prefix with ``key``, if somebody holds it."""
        return self._prefixes.get(key)

    def hold(self, prefix: Prefix) -> None:
        """Know a prefix that was read elsewhere (a snapshot), so that ``prefill`` finds it."""
        self._prefixes[prefix.key] = prefix

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, on_token: Callable[[int, int], None] | None = None
    ) -> list[Answer]:
        """Answer all ``requests`` together. ``on_token`` gets the number of a request and a token of its answer, at once.

        Tokens are chosen on rank 0. Collective: ``Runner.read``, ``Runner.token``, and a broadcast of the tokens over tp x cp.
        """
        started_s = time.perf_counter()
        tails = self._tails(requests, sampling.max_new_tokens)
        hidden_BH = torch.cat([hidden[-1:] for hidden in self._read_tails(requests, tails, last_only=True)])
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        ends = [request.start + len(request.tail) for request in requests]
        step = TokenStep(
            token_ids_B=self._agreed(choose(self.runner.logits(hidden_BH), sampling, generator)),
            positions_B=torch.tensor(ends, device=self.device),
            tails=tails,
            shared=_shared(requests),
        )
        found: list[list[int]] = [[] for _ in requests]
        stopped: list[str] = ["" for _ in requests]
        first_s = self._take(step.token_ids_B, found, stopped, sampling, on_token) - started_s
        begun_s = time.perf_counter()
        if not all(stopped):
            graphed = GraphedStep(lambda: self.runner.token(step), self.device)
            while not all(stopped):
                step.token_ids_B.copy_(self._agreed(choose(graphed(), sampling, generator)))
                self._take(step.token_ids_B, found, stopped, sampling, on_token)
        seconds = time.perf_counter() - begun_s
        return [Answer(np.array(ids, np.int64), why, first_s, seconds) for ids, why in zip(found, stopped, strict=True)]

    def predictions(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Teacher forcing: for each token of each tail the likeliest token after it, int64. Collective, as ``Runner.read``."""
        tails = self._tails(requests, 0)
        hidden = self._read_tails(requests, tails, last_only=False)
        return [self.runner.logits(hidden_nH).argmax(-1).cpu().numpy() for hidden_nH in hidden]

    def observe(self, request: Request, observer: Observer) -> None:
        """Read the tail of a request while ``observer`` looks on; nothing is kept. Collective, as ``Runner.read``."""
        self._read_tails([request], self._tails([request], 0), last_only=True, observer=observer)

    def _tails(self, requests: Sequence[Request], new_tokens: int) -> Tails:
        if not requests or any(not len(request.tail) for request in requests):
            raise SettingError("a question needs at least one token after the last frame")
        # The ring ranks take turns with new tokens; the last place is left to what others keep.
        room = (
            self._room([len(places) for places in self._tail_parts(requests)])
            + -(-new_tokens // self.topology.grid.ring)
            + 1
        )
        return Tails.empty(self.span_shape, len(requests), room, self.cache_dtype, self.device)

    def _tail_parts(self, requests: Sequence[Request]) -> list[range]:
        """Places in the tails that are read together: those of all tails are one chunk."""
        longest, step = max(len(request.tail) for request in requests), max(1, self.chunk_tokens // len(requests))
        return [range(first, min(first + step, longest)) for first in range(0, longest, step)]

    def _room(self, lengths: Sequence[int]) -> int:
        """Most tokens, padding left out, that a ring rank keeps of chunks of a sequence with these lengths."""
        grid = self.topology.grid
        # The last document of a row is padded to a multiple of the row's.
        padded = (length + grid.document_multiple + grid.row_multiple for length in lengths)
        return min(sum(lengths), sum(tokens // grid.ring for tokens in padded))

    def _read_tails(
        self, requests: Sequence[Request], tails: Tails, last_only: bool, observer: Observer | None = None
    ) -> list[torch.Tensor]:
        """Hidden states [n, H] of the tokens of each tail, or of its last one, on all ranks."""
        found: list[list[torch.Tensor]] = [[] for _ in requests]
        for places in self._tail_parts(requests):
            rows = [row for row, request in enumerate(requests) if places.start < len(request.tail)]
            pieces = [
                Piece(
                    document=_text(requests[row].tail[places.start : places.stop]),
                    start=requests[row].start + places.start,
                    before=(*requests[row].spans, tails.spans[row]),
                    into=tails.spans[row],
                )
                for row in rows
            ]
            chunk = self.runner.plan(pieces)
            hidden_t1H = self.runner.read(chunk, observer=observer)
            bounds = chunk.plan.row.cu_seqlens
            for i, row in enumerate(rows):
                length = len(pieces[i].document)
                is_last = places.start + length == len(requests[row].tail)
                wanted = (
                    np.arange(length - 1 if last_only else 0, length)
                    if is_last or not last_only
                    else np.empty(0, np.int64)
                )
                if len(wanted):
                    found[row].append(self.runner.hidden_at(chunk, hidden_t1H, bounds[i] + wanted))
        return [torch.cat(parts) for parts in found]

    def _agreed(self, token_ids_B: torch.Tensor) -> torch.Tensor:
        if self.topology.grid.encoders > 1:
            dist.broadcast(token_ids_B, group=self.topology.tp_cp, group_src=0)
        return token_ids_B

    def _take(self, token_ids_B, found, stopped, sampling: Sampling, on_token) -> float:
        """Add the new tokens to the answers that go on; the time at which they were there."""
        token_ids = token_ids_B.tolist()
        for row, token in enumerate(token_ids):
            if stopped[row]:
                continue
            if token in sampling.stop_ids:
                stopped[row] = "stop"
                continue
            found[row].append(token)
            if len(found[row]) == sampling.max_new_tokens:
                stopped[row] = "length"
            if on_token is not None:
                on_token(row, token)
        return time.perf_counter()


def cache_dtype_of(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Dtype of keys and values for a setting of the cache."""
    kinds = {"auto": model_dtype} | CACHE_DTYPES
    if name not in kinds:
        raise SettingError(f"cache={name} is not a dtype of a cache; use {', '.join(kinds)}")
    return kinds[name]


def _shared(requests: Sequence[Request]) -> tuple[tuple[Span, tuple[int, ...]], ...]:
    """Each span before the tails, once, with the rows that see it."""
    seen: dict[int, tuple[Span, list[int]]] = {}
    for row, request in enumerate(requests):
        for span in request.spans:
            seen.setdefault(id(span), (span, []))[1].append(row)
    return tuple((span, tuple(rows)) for span, rows in seen.values())


def _alike(one: Document, other: Document) -> bool:
    return (
        one.frames == other.frames
        and np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.frame_starts, other.frame_starts)
    )


def _text(token_ids: np.ndarray) -> Document:
    return Document(token_ids, np.full(len(token_ids), IGNORE, np.int64), (), np.empty(0, np.int64), "question")

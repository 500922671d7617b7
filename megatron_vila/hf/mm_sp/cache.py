"""The key/value cache of MM-SP under Transformers: each rank keeps its own part of a sequence, and attention goes to the parts.

Transformers carries the cache through its models as it carries any ``Cache``. Its ``update`` passes keys and values on untouched,
because a rank needs those of its own heads and ring part only, which are known inside attention (``PromptChunk``,
``DecodedToken``).

Legend: s local tokens of a chunk, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import Cache

from megatron_vila.hf.mm_sp.data import ShardedRow
from megatron_vila.parallel.attention2d import RowIndices
from megatron_vila.parallel.cache import Span, SpanShape, Tails
from megatron_vila.parallel.cached_attention import CachedAttention, ChunkDocument, kept_positions
from megatron_vila.plan.grid import GridShape

Attentions = Callable[[torch.Tensor, float], CachedAttention]
"""The attention for a query tensor [1, H, s, D] and a scale."""

_ONE_SEQUENCE = "a cache of MM-SP keeps one sequence; call generate once for each prompt, with num_beams=1"


class ShardedCache(Cache):
    """This rank's part of the keys and values of one sequence, made by ``MMSP.cache``.

    ``dtype`` is that of the kept numbers, None for that of the model. ``token_ids`` are the tokens read so far, on all ranks
    alike; a call of ``generate`` keeps as many of them as its prompt begins with. ``next_position`` is that of the next token:
    one more than the largest so far, which need not be the number of tokens. It holds no process group, so it can be copied.
    """

    def __init__(self, grid: GridShape, rank: int, layers: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(layers=[])
        self.ring, self._ring_rank = grid.ring, grid.coordinates(rank).ring
        self._layers, self._dtype = layers, dtype
        self._spans: list[Span] = []
        self._tail: Tails | None = None
        self._ids: list[torch.Tensor] = []
        self._positions: list[np.ndarray] = []
        self.next_position = 0
        self._tokens = 0
        self._room, self._tail_room = 0, 0

    @property
    def token_ids(self) -> np.ndarray:
        """int64 [tokens read]; waits for the device."""
        if len(self._ids) > 1:
            self._ids = [torch.cat([ids.cpu() for ids in self._ids])]
        return self._ids[0].cpu().numpy() if self._ids else np.empty(0, np.int64)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What this rank keeps, in the order of the sequence."""
        return (*self._spans, *(self._tail.spans if self._tail is not None else ()))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that this rank keeps."""
        return sum(span.nbytes for span in self.spans)

    def expect(self, kept: int, new_tokens: int) -> None:
        """Room for the next tokens: ``kept`` of a prompt on this rank, and ``new_tokens`` decoded ones on all together."""
        self._end_tail()
        self._room, self._tail_room = kept, max(1, -(-new_tokens // self.ring))

    def kept(self, cu_seqlens: np.ndarray, tokens: int) -> np.ndarray:
        """Positions in its document, int64, of what this rank keeps of a row of one document, which has ``tokens``."""
        return kept_positions(cu_seqlens, [tokens], self.ring, self._ring_rank)[0]

    def keeps_next(self) -> bool:
        """Whether this rank keeps the next decoded token: they are dealt over the ring in turn."""
        return self._tokens % self.ring == self._ring_rank

    def span(self, shape: SpanShape, dtype: torch.dtype, device: torch.device) -> Span:
        """The span into which the next chunk of a prompt goes."""
        if self._room:
            self._spans.append(Span.empty(shape, self._room, self._dtype or dtype, device))
            self._room = 0
        elif not self._spans:
            self._spans.append(Span.empty(shape, 0, self._dtype or dtype, device))
        return self._spans[-1]

    def tail(self, shape: SpanShape, dtype: torch.dtype, device: torch.device) -> Tails:
        """The span into which the next decoded token goes; its last place is for tokens that other ranks keep."""
        last = self._tail.spans[0] if self._tail is not None else None
        if last is not None and self.keeps_next() and last.length + 1 == last.capacity:
            self._end_tail()
        if self._tail is None:
            self._tail = Tails.empty(shape, 1, self._tail_room + 1, self._dtype or dtype, device)
        return self._tail

    def _end_tail(self) -> None:
        self._spans, self._tail = list(self.spans), None

    def commit(self, ids_n: torch.Tensor, positions_n: np.ndarray | None = None) -> None:
        """Count ``ids_n`` int64 [n] as read, once all layers have written what this rank keeps of them. ``positions_n`` int64 [n]
        are their largest positions, by default the next ones."""
        if positions_n is None:
            positions_n = np.arange(self.next_position, self.next_position + len(ids_n))
        self._ids.append(ids_n)
        self._positions.append(positions_n)
        self.next_position = max(self.next_position, int(positions_n.max(initial=-1)) + 1)
        self._tokens += len(ids_n)

    def keep(self, tokens: int) -> None:
        """Forget all but the first ``tokens`` of the sequence, and what a forward pass that failed has left. No collective."""
        ids = self.token_ids
        if not 0 <= tokens <= len(ids):
            raise ValueError(f"a cache of {len(ids)} tokens cannot keep {tokens}; give 0 to {len(ids)}")
        self._ids, self._tokens = [torch.from_numpy(ids[:tokens])], tokens
        self._positions = [np.concatenate([np.empty(0, np.int64), *self._positions])[:tokens]]
        self.next_position = int(self._positions[0].max(initial=-1)) + 1
        for span in self.spans:
            span.shorten(int(np.searchsorted(span.positions, tokens)))
        if tokens == 0:
            self._spans, self._tail = [], None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as ``DynamicCache.crop``."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be negative: the number of tokens to remove")
        self.keep(max(0, self._tokens + tokens_to_remove))

    def reset(self) -> None:
        self.keep(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise ValueError(_ONE_SEQUENCE)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError(_ONE_SEQUENCE)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise ValueError(_ONE_SEQUENCE)

    def __len__(self) -> int:
        return self._layers

    def __repr__(self) -> str:
        return f"ShardedCache({self._tokens} tokens)"


class PromptChunk:
    """The keyword ``mm_sp_row`` of a chunk of a prompt on its way through the layers."""

    def __init__(self, row: ShardedRow, indices: RowIndices, cache: ShardedCache, attentions: Attentions) -> None:
        self.row, self._indices, self._cache, self._attentions = row, indices, cache, attentions
        self._document: ChunkDocument | None = None
        self._kept = cache.kept(row.cu_seqlens, row.tokens)

    def attend(
        self, layer: int, q_1HsD: torch.Tensor, k_1KsD, v_1KsD, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the chunk's local tokens to it and to all before, [1, s, H, D]. Collectives: ``CachedAttention.chunk``."""
        _check_window(window, self._cache.get_seq_length() + self.row.tokens)
        attention = self._attentions(q_1HsD, scale)
        if self._document is None:
            self._document = self._begin(attention, q_1HsD)
        q_sHD, k_sKD, v_sKD = (x[0].transpose(0, 1) for x in (q_1HsD, k_1KsD, v_1KsD))
        return attention.chunk(q_sHD, k_sKD, v_sKD, self._indices, [self._document], layer)[None]

    def _begin(self, attention: CachedAttention, q_1HsD: torch.Tensor) -> ChunkDocument:
        cache = self._cache
        into = cache.span(attention.span_shape(len(cache), q_1HsD.shape[-1]), q_1HsD.dtype, q_1HsD.device)
        return ChunkDocument(cache.spans, into, cache.get_seq_length(), len(self._kept))

    def commit(self) -> None:
        """After the last layer: this rank's tokens of the chunk count as kept."""
        assert self._document is not None, "no layer has attended"
        self._document.into.commit(self._document.earlier + self._kept)


class DecodedToken:
    """The keyword ``mm_sp_row`` of a decoded token, which all ranks compute alike."""

    def __init__(self, ids_1: torch.Tensor, cache: ShardedCache, attentions: Attentions) -> None:
        """``ids_1`` int64 [1] is the token."""
        self._ids_1, self._cache, self._attentions = ids_1, cache, attentions
        self._tail: Tails | None = None

    def attend(
        self, layer: int, q_1H1D: torch.Tensor, k_1K1D, v_1K1D, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the token to itself and to all before it, [1, 1, H, D]. Collectives: ``CachedAttention.token``."""
        _check_window(window, self._cache.get_seq_length() + 1)
        attention = self._attentions(q_1H1D, scale)
        if self._tail is None:
            self._begin(attention, q_1H1D)
        assert self._tail is not None
        q_BHD, k_BKD, v_BKD = (x[:, :, 0] for x in (q_1H1D, k_1K1D, v_1K1D))
        return attention.token(q_BHD, k_BKD, v_BKD, self._tail, self._places_B, self._shared, layer)[:, None]

    def _begin(self, attention: CachedAttention, q_1H1D: torch.Tensor) -> None:
        cache, device = self._cache, q_1H1D.device
        self._tail = cache.tail(attention.span_shape(len(cache), q_1H1D.shape[-1]), q_1H1D.dtype, device)
        before = [span for span in cache.spans if span.length and span is not self._tail.spans[0]]
        self._shared = [(span, (0,)) for span in before]
        self._places_B = self._tail.places(torch.full((1,), cache.keeps_next(), device=device))

    def commit(self) -> None:
        """After the last layer: the token counts as read, and as kept on one rank of the ring."""
        assert self._tail is not None, "no layer has attended"
        place = self._cache.get_seq_length()
        self._tail.spans[0].commit(np.full(int(self._cache.keeps_next()), place))
        self._cache.commit(self._ids_1)


def _check_window(window: int | None, tokens: int) -> None:
    """Raise ``ValueError``, on all ranks alike, if a token would attend to others that are no longer in its window."""
    if window is not None and tokens > window:
        raise ValueError(
            f"sliding_window={window} is shorter than a sequence of {tokens} tokens, and the cache of MM-SP attends to all of "
            "them; generate under `with mm_sp.paused():`"
        )

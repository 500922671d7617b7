"""Chunks of prompts and single tokens through the layers of this rank, with keys and values kept.

A chunk is a packed row of pieces of sequences. It takes the path of a row in training: frames and tokens are dealt by
``plan/row_plan.py``, visual tokens go to their places by the stage-2 exchange, layers run as they are. Only attention differs
(``parallel/cached_attention.py``). Decoded tokens are computed by all context-parallel ranks alike; tensor parallelism splits
their layers as in training.

Legend: s tokens of a CP rank, t = s/tp, N visual tokens made here, n tokens that are asked for, B sequences that are decoded
together, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.config.schema import LanguageConfig
from megatron_vila.errors import SettingError
from megatron_vila.models.decoder.decoder import run_layer
from megatron_vila.models.shard import RowShard
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.cache import Span, SpanShape, Tails
from megatron_vila.parallel.cached_attention import CachedAttention, ChunkDocument, Observer, kept_positions
from megatron_vila.parallel.rope import rotary_angles
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.chunks import row_of
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import Document
from megatron_vila.plan.row_plan import RowPlan, ShardPlan
from megatron_vila.plan.sizes import head_dim
from megatron_vila.plan.tokens import owners


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence, of which ``start`` come before.

    ``before`` are all spans that hold those; the new tokens go into ``into``, which is among them where it holds some already.
    """

    document: Document
    start: int
    before: tuple[Span, ...]
    into: Span


@dataclass(frozen=True)
class Chunk:
    """Pieces of different sequences that are read together, planned for one rank. ``kept[i]`` int64 are the positions of the
    tokens of piece i that the rank keeps."""

    pieces: tuple[Piece, ...]
    plan: ShardPlan
    kept: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece], grid: GridShape, rank: int) -> Chunk:
        starts = [piece.start for piece in pieces]
        row = row_of([piece.document for piece in pieces], starts, grid)
        kept = kept_positions(row.cu_seqlens, row.lengths, grid.ring, grid.coordinates(rank).ring)
        positions = tuple(part + start for part, start in zip(kept, starts, strict=True))
        return cls(tuple(pieces), RowPlan.of(row, grid).shard(rank), positions)


class Runner:
    """One rank's part of the model at work. Collective: all ranks call the same methods with the same sequences.

    Raises ``SettingError`` for pipeline stages and replicas.
    """

    def __init__(self, model: VilaModel, topology: ParallelTopology, llm: LanguageConfig) -> None:
        grid = topology.grid
        if grid.pp > 1 or grid.dp > 1:
            raise SettingError(
                f"parallel.pp={grid.pp} with {grid.dp} replicas: a model answers with one pipeline stage and one replica; use "
                "parallel.pp=1 (a checkpoint of any layout loads so) and tp*ulysses*ring ranks"
            )
        self.model, self.topology, self._llm = model, topology, llm
        self.device, self.dtype = next(model.parameters()).device, model.config.params_dtype
        self.attention = CachedAttention(model.llm.decoder.layers[0].self_attention.core_attention.attention)
        self.head_dim = head_dim(llm)

    @property
    def span_shape(self) -> SpanShape:
        return self.attention.span_shape(len(self.model.llm.decoder.layers), self.head_dim)

    def plan(self, pieces: Sequence[Piece]) -> Chunk:
        return Chunk.of(pieces, self.topology.grid, self.topology.rank)

    @torch.no_grad()
    def read(self, chunk: Chunk, made_NH: torch.Tensor | None = None, observer: Observer | None = None) -> torch.Tensor:
        """Read a chunk: hidden states [t, 1, H] of this rank's tokens after the last layer and the final norm.

        ``made_NH`` are this rank's visual tokens, None if the chunk has no frames. The pieces' spans hold their tokens
        afterwards. Collectives as in training (stage-2 exchange, tp, ulysses, ring) and those of ``CachedAttention.chunk``.
        """
        shard = RowShard.of(chunk.plan, self.topology, self._llm, self.dtype, self.device)
        if made_NH is None:
            made_NH = torch.empty(0, self._llm.hidden_size, dtype=self.dtype, device=self.device)
        documents = [
            ChunkDocument(piece.before, piece.into, piece.start, len(kept))
            for piece, kept in zip(chunk.pieces, chunk.kept, strict=True)
        ]
        if observer is not None:
            (piece,) = chunk.pieces
            observer.begin_chunk(chunk.plan.row.cu_seqlens, len(piece.document), piece.start)
        cos_SD, sin_SD, indices = shard.params.cos_SD, shard.params.sin_SD, shard.params.indices

        def attend(number: int, qkv_s1KX: torch.Tensor) -> torch.Tensor:
            q, k, v = self._rotated(number, qkv_s1KX, cos_SD, sin_SD)
            return self.attention.chunk(q, k, v, indices, documents, number, observer).flatten(1).unsqueeze(1)

        hidden_t1H = self._layers(self.model.embed(shard, made_NH), attend)
        for piece, kept in zip(chunk.pieces, chunk.kept, strict=True):
            piece.into.commit(kept)
        return hidden_t1H

    @torch.no_grad()
    def hidden_at(self, chunk: Chunk, hidden_t1H: torch.Tensor, places_n: np.ndarray) -> torch.Tensor:
        """Hidden states [n, H] of the tokens at places of the row, on all ranks. All-reduce over the tp_cp group."""
        grid = self.topology.grid
        rank_n, slot_n = owners(chunk.plan.row.cu_seqlens, grid.cp, grid.tp, places_n)
        mine = np.flatnonzero(rank_n == grid.encoder_rank(self.topology.rank))
        found_nH = hidden_t1H.new_zeros(len(places_n), hidden_t1H.shape[-1])
        found_nH[torch.from_numpy(mine).to(self.device)] = hidden_t1H[torch.from_numpy(slot_n[mine]).to(self.device), 0]
        if grid.encoders > 1:
            dist.all_reduce(found_nH, group=self.topology.tp_cp)
        return found_nH

    @torch.no_grad()
    def token(self, step: TokenStep) -> torch.Tensor:
        """The next token of B sequences: logits [B, V] of what follows it, float32 or wider, on all ranks.

        Host and device do not wait for each other, and all that changes is on the device, so that it can be captured in a CUDA
        graph. Collectives over tp, ulysses and ring.
        """
        grid, rows = self.topology.grid, len(step.token_ids_B)
        places_B = step.tails.places(step.positions_B % grid.ring == self.topology.place.ring)
        ids_1P = torch.nn.functional.pad(step.token_ids_B, (0, -rows % grid.tp))[None]
        angles = rotary_angles(
            step.positions_B, self.head_dim, self._llm.rope_theta, self._llm.rope_scaling_factor, self.dtype
        )
        cos_PD, sin_PD = (torch.nn.functional.pad(x, (0, 0, 0, -rows % grid.tp)) for x in angles)

        def attend(number: int, qkv_P1KX: torch.Tensor) -> torch.Tensor:
            q, k, v = (x[:rows] for x in self._rotated(number, qkv_P1KX, cos_PD, sin_PD))
            out_BHD = self.attention.token(q, k, v, step.tails, places_B, step.shared, number)
            return torch.nn.functional.pad(out_BHD.flatten(1), (0, 0, 0, -rows % grid.tp)).unsqueeze(1)

        hidden_t1H = self._layers(self.model.llm.embedding(input_ids=ids_1P, position_ids=None), attend)
        hidden_PH = self._gathered_over_tp(hidden_t1H[:, 0])
        step.positions_B += 1
        return self.logits(hidden_PH[:rows])

    @torch.no_grad()
    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states that all ranks have, float32 or wider. All-gather over tp."""
        llm = self.model.llm
        tied = self.model.share_embeddings_and_output_weights
        weight_VH = llm.shared_embedding_or_output_weight() if tied else llm.output_layer.weight
        logits_nV = (hidden_nH @ weight_VH.t()).to(torch.promote_types(self.dtype, torch.float32))
        parts = self._gathered_over_tp(logits_nV.t()).t()
        return parts[:, : self.model.vocab_size]

    def _layers(self, hidden_t1H: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        decoder = self.model.llm.decoder
        for number, layer in enumerate(decoder.layers):
            hidden_t1H = run_layer(layer, hidden_t1H, partial(attend, number))
        return decoder.final_layernorm(hidden_t1H)

    def _rotated(self, number: int, qkv_s1KX: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor):
        return self.model.llm.decoder.layers[number].self_attention.core_attention.rotated(qkv_s1KX, cos_SD, sin_SD)

    def _gathered_over_tp(self, x_t: torch.Tensor) -> torch.Tensor:
        """The rows of all tp ranks. All-gather over tp."""
        tp = self.topology.grid.tp
        if tp == 1:
            return x_t
        out = x_t.new_empty(tp * len(x_t), *x_t.shape[1:])
        dist.all_gather_into_tensor(out, x_t.contiguous(), group=self.topology.tp)
        return out


@dataclass
class TokenStep:
    """What B sequences have to be told for their next tokens, all on the device.

    ``token_ids_B`` and ``positions_B`` int64 are those of the tokens to read; ``shared`` the spans before the tails, each with
    the rows that see it. A step advances ``positions_B`` and the lengths of ``tails``; the caller sets ``token_ids_B``.
    """

    token_ids_B: torch.Tensor
    positions_B: torch.Tensor
    tails: Tails
    shared: tuple[tuple[Span, tuple[int, ...]], ...]

"""The data collator of MM-SP under Transformers: whole samples in, this rank's share of one packed row out.

Samples become the documents of a row, each padded to a multiple of 2*cp tokens at its end and cut zigzag (Megatron-Core's
layout, ``plan/tokens.py``). Labels are shifted on the whole document before the cut. All of this, with the plan of the row
(``plan/row_plan.py``), is computed on the host without communication, so it runs in the workers of a DataLoader.

Legend: S tokens of the row, s = S/cp local tokens, n supervised ones among them, D documents, M visual tokens owned by
a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vila.hf.mm_sp.adapters import VISION_KEYS, Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.same_row import fingerprint
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, Document, Row, pack, references
from megatron_vila.plan.row_plan import AttentionPlan, RowPlan, ShardPlan
from megatron_vila.plan.tokens import RankReshard

KEYS = ("input_ids", "labels", "attention_mask")
PIXELS = "mm_sp_pixels"
"""The pixels of this rank in a batch, for a model with vision: [R, ...]."""


@dataclass(frozen=True)
class VisionPlan:
    """What a rank does with the pictures and videos of a row.

    ``units`` are those that the rank encodes, in the order of the row, as are their pixels. ``reshard`` sends the tokens that
    they become to the ranks that own them. ``is_video`` bool [M] tells for each visual token that this rank owns, in the order
    of its tokens, whether it is one of a video. ``most`` is the largest number of units that a rank has, ``most_rows`` that of
    rows of pixels.
    """

    units: tuple[VisionUnit, ...]
    reshard: RankReshard
    is_video: np.ndarray
    most: int
    most_rows: int


@dataclass(frozen=True)
class ShardedRow:
    """What a rank knows of a row, in host memory; it goes through the model's forward as ``mm_sp_row``.

    It is that of rank ``rank`` of ``grid``. ``cu_seqlens`` int64 [D+1] are the bounds of the documents. ``positions`` int64 [s]
    are the places of the local tokens in the row, ``selected`` int64 [n] the indices of the supervised ones among the local
    tokens. ``supervised`` and ``tokens`` (without padding) count tokens of the whole row, ``longest`` those of its longest
    document. ``fingerprint`` is the same on all ranks that were given the same samples (``same_row.py``). ``attention`` and,
    for a model with vision, ``vision`` are this rank's part of the plan of the row, which the training process copies to its
    device.
    """

    grid: GridShape
    rank: int
    cu_seqlens: np.ndarray
    positions: np.ndarray
    selected: np.ndarray
    supervised: int
    tokens: int
    longest: int
    fingerprint: np.ndarray
    attention: AttentionPlan
    vision: VisionPlan | None


@dataclass(frozen=True)
class PlacedSample:
    """A sample as a ``document`` and its units of vision ``pieces``, in the order of their places. ``positions`` int64 [A, L] are
    those of the model if they have A axes, else None."""

    document: Document
    pieces: tuple[Piece, ...]
    positions: np.ndarray | None
    has_labels: bool


@dataclass(frozen=True)
class ShardCollator:
    """``collate_fn`` for rank ``rank`` of ``grid``, whose ulysses x ring ranks share a sample.

    A sample is a mapping with ``input_ids`` [L] (or [1, L]) and, for training, ``labels`` of the same shape in the convention of
    Transformers: not shifted, -100 where nothing is learned. Tokens at either end whose ``attention_mask`` is 0 are padding and
    taken out. For a model with vision a sample also has the fields of ``adapter``, whose pixels may be read lazily: only this
    rank's are read. Ids and labels are compared with ``vocabulary``, the number of tokens of the model, unless it is None.

    Returns ``input_ids`` and (if the samples have them) ``labels``, int64 [1, s] each, labels shifted; ``position_ids`` int64
    [1, s], or [A, 1, s] for a model whose positions have A axes; ``mm_sp_pixels`` [R, ...] with the R rows of pixels that this
    rank encodes, for a model with vision; ``mm_sp_row``. All ranks that share a sample must be given the same samples, which the
    model's forward checks. Raises ``ValueError`` that lists everything wrong with the samples.
    """

    grid: GridShape
    rank: int
    adapter: VisionAdapter | None
    vocabulary: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if isinstance(samples, Mapping):
            raise ValueError("MM-SP cannot shard this batch: it is one mapping; give a list of samples")
        problems: list[str] = []
        placed = [self._placed(sample, f"sample {i}", 0, problems) for i, sample in enumerate(samples)]
        if not samples:
            problems.append("the batch has no samples; give at least one")
        if len({sample.has_labels for sample in placed}) > 1:
            problems.append(
                "some samples have labels and some have none; give all of them labels (-100 where nothing is learned)"
            )
        if problems:
            raise ValueError("MM-SP cannot shard this batch: " + "; ".join(problems))
        row = pack([sample.document for sample in placed], self.grid.document_multiple, self.grid.row_multiple)
        has_labels = placed[0].has_labels
        pieces = [piece for sample in placed for piece in sample.pieces]
        batch = self.share(row, pieces, [sample.positions for sample in placed], has_labels)
        if has_labels:
            batch["labels"] = _tensor(row.labels[batch["mm_sp_row"].positions])
        return batch

    def prompt(self, sample: Mapping[str, Any], name: str, first: int) -> PlacedSample:
        """A sample whose positions go on from ``first``. ``name`` is what messages call it.

        Raises ``ValueError`` that lists everything wrong with the sample.
        """
        problems: list[str] = []
        placed = self._placed(sample, name, first, problems)
        if problems:
            raise ValueError("MM-SP cannot read this prompt: " + "; ".join(problems))
        return placed

    def share(
        self, row: Row, pieces: Sequence[Piece], positions: Sequence[np.ndarray | None], has_labels: bool = False
    ) -> dict[str, Any]:
        """This rank's share of ``row``, but for its labels. ``pieces`` are the units of the row, ``positions`` those of each of
        its documents, as in ``PlacedSample``."""
        visual = () if self.adapter is None else self.adapter.token_ids
        if 0 in visual:
            _fill(row, next(token for token in range(len(visual) + 1) if token not in visual))
        plan = RowPlan.of(row, self.grid)
        places, part = plan.places(self.rank), plan.shard(self.rank)
        batch = {
            "input_ids": _tensor(row.token_ids[places]),
            "position_ids": _tensor(part.positions) if positions[0] is None else _axes(row, positions, places),
            "mm_sp_row": ShardedRow(
                grid=self.grid,
                rank=self.rank,
                cu_seqlens=row.cu_seqlens,
                positions=places,
                selected=part.selected,
                supervised=row.supervised_tokens,
                tokens=sum(row.lengths),
                longest=max(row.lengths),
                fingerprint=fingerprint(row, [piece.unit for piece in pieces], positions, has_labels),
                attention=part.attention,
                vision=None if self.adapter is None else self._vision(pieces, plan, part),
            ),
        }
        if self.adapter is not None:
            batch[PIXELS] = _pixels(pieces[part.frames.start : part.frames.stop], self.adapter)
        return batch

    def _placed(self, sample: Mapping[str, Any], name: str, first: int, problems: list[str]) -> PlacedSample:
        ids, labels, has_labels = self._tokens(sample, name, problems)
        pieces: list[Piece] = []
        positions = None
        if self.adapter is not None and len(ids):
            try:
                pieces = sorted(self.adapter.pieces(sample, ids), key=lambda piece: piece.start)
                positions = self.adapter.positions(sample, ids, pieces, first)
            except ValueError as error:
                problems.append(f"{name} {error}")
        units = [Unit(frames=1, tiles=1, tokens=piece.unit.tokens, cost=piece.unit.cost) for piece in pieces]
        starts = np.array([piece.start for piece in pieces], dtype=np.int64)
        document = Document(ids, np.append(labels[1:], IGNORE), references("", range(len(units)), True, units), starts, "")
        return PlacedSample(document, tuple(pieces), positions, has_labels)

    def _tokens(
        self, sample: Mapping[str, Any], name: str, problems: list[str]
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Token ids and labels of a sample without padding, int64 [L] each, and whether it has labels."""
        known = KEYS if self.adapter is None else KEYS + self.adapter.keys
        hints = {} if self.adapter is None else self.adapter.hints
        for key in sorted(set(sample) - set(known) - set(() if self.adapter is None else self.adapter.ignored)):
            if self.adapter is None and key in VISION_KEYS:
                if sample[key] is None:
                    continue
                problems.append(f"{name} has {key} but the model takes text only; leave them out")
                continue
            hint = f"; {hints[key]}" if key in hints else ""
            problems.append(f"{name} has {key}, which MM-SP cannot shard (it knows {', '.join(known)}){hint}")
        nothing = np.zeros(0, np.int64)
        given = {}
        for key in KEYS:
            if sample.get(key) is None:
                continue
            try:
                given[key] = _flat(sample[key])
            except (ValueError, TypeError) as error:
                problems.append(f"{name} has {key} that are no whole numbers in one row ({error}); give token ids")
                return nothing, nothing, False
        if "input_ids" not in given:
            problems.append(f"{name} has no input_ids; give its token ids")
            return nothing, nothing, False
        ids = given["input_ids"]
        labels, mask = given.get("labels", np.full(len(ids), IGNORE)), given.get("attention_mask", np.ones(len(ids)))
        for key, values in (("labels", labels), ("attention_mask", mask)):
            if len(values) != len(ids):
                problems.append(f"{name} has {len(values)} {key} for {len(ids)} input_ids; give one for each of them")
                return ids, ids, True
        kept = np.flatnonzero(mask)
        if len(kept) and kept[-1] - kept[0] >= len(kept):
            hole = kept[0] + int((mask[kept[0] :] == 0).argmax())
            problems.append(
                f"{name} has attention_mask 0 at token {hole}, between tokens with 1; padding is taken out at the ends only: "
                "leave these tokens out of the sample, or attend to them"
            )
        ids, labels = ids[mask != 0], labels[mask != 0]
        if self.adapter is not None and self.adapter.unlearned:
            labels = np.where(np.isin(labels, self.adapter.unlearned), IGNORE, labels)
        problems += self._foreign(ids, labels, name)
        if not len(ids):
            problems.append(f"{name} has no token, or attention_mask takes out all of them; leave the sample out")
        return ids, labels, sample.get("labels") is not None

    def _foreign(self, ids: np.ndarray, labels: np.ndarray, name: str) -> list[str]:
        """What is no token of the model among ids and labels: one rank would fail while the others wait, and the loss of a label
        would be wrong without an error."""
        if self.vocabulary is None:
            return []
        visual = () if self.adapter is None else self.adapter.token_ids
        found = []
        for key, values, others, cure in (
            ("input_ids", ids, visual, "use the model's own tokenizer, or resize_token_embeddings before enable_mm_sp"),
            ("labels", labels, (IGNORE,), f"labels are token ids, or {IGNORE} where nothing is learned"),
        ):
            wrong = values[((values < 0) | (values >= self.vocabulary)) & ~np.isin(values, others)]
            if len(wrong):
                found.append(f"{name} has {wrong[0]} in {key} but the model has {self.vocabulary} tokens; {cure}")
        return found

    def _vision(self, pieces: Sequence[Piece], plan: RowPlan, part: ShardPlan) -> VisionPlan:
        units = [piece.unit for piece in pieces]
        is_video = np.repeat([unit.is_video for unit in units], [unit.tokens for unit in units]).astype(bool)
        rows = np.cumsum([0, *(unit.rows for unit in units)])
        return VisionPlan(
            units=tuple(units[part.frames.start : part.frames.stop]),
            reshard=part.reshard,
            is_video=is_video[plan.reshard.owner == self.grid.encoder_rank(self.rank)],
            most=int(np.diff(plan.reshard.boundaries).max()),
            most_rows=int(np.diff(rows[plan.reshard.boundaries]).max()),
        )


def _axes(row: Row, positions: Sequence[np.ndarray | None], places: np.ndarray) -> torch.Tensor:
    """Positions int64 [A, 1, s] of the tokens at ``places``; those of padding are 0."""
    assert positions[0] is not None
    whole = np.zeros((len(positions[0]), row.length), np.int64)
    for start, own in zip(row.cu_seqlens[:-1], positions, strict=True):
        assert own is not None
        whole[:, start : start + own.shape[1]] = own
    return torch.from_numpy(whole[:, None, places])


def _pixels(pieces: Sequence[Piece], adapter: VisionAdapter) -> torch.Tensor:
    """The pixels of ``pieces``; no other is touched. What follows one another in the same object is read at once."""
    parts: list[torch.Tensor] = []
    number = 0
    while number < len(pieces):
        pixels, first = pieces[number].pixels, pieces[number].first_row
        stop = first
        while number < len(pieces) and pieces[number].pixels is pixels and pieces[number].first_row == stop:
            stop += pieces[number].unit.rows
            number += 1
        part = torch.as_tensor(pixels[first:stop])
        adapter.check_rows(part)
        parts.append(part)
    return torch.cat(parts) if parts else torch.zeros(0, *adapter.row_shape)


def _flat(values: Any) -> np.ndarray:
    """Raises ``ValueError`` for numbers with a fraction."""
    found = np.asarray(values).reshape(-1)
    if found.dtype.kind == "f" and (found % 1).any():
        raise ValueError("numbers with a fraction")
    return found.astype(np.int64)


def _fill(row: Row, token: int) -> None:
    """Fill the padding of ``row`` with ``token``, for a model in which the usual token 0 stands for a picture or a video."""
    for start, length, end in zip(row.cu_seqlens[:-1], row.lengths, row.cu_seqlens[1:], strict=True):
        row.token_ids[start + length : end] = token


def _tensor(values_s: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values_s, dtype=np.int64))[None]

"""Documents and packed rows: the one micro-batch format of the project.

A *document* is one sample after tokenization: text ids, places of visual tokens, shifted labels and references to the
frames that fill those places. A *row* is one or more documents packed one after the other; an unpacked sample is a row
with one document. Both are metadata: no pixel is decoded here, so every rank of a model-parallel block holds the same
row and each decodes only the frames that it encodes.

Legend: D documents, L tokens of a document, S tokens of a row (with padding), F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vila.plan.pictures import Unit

MEDIA_TOKEN = -1
"""Stands at each visual-token place of ``token_ids``; never looked up in the embedding table."""

IGNORE = -100
"""Label of a token that is not supervised."""

MediaName = Any
"""The path of a file, or a member of a shard (``data/media.py``): a plan only compares it with others."""


@dataclass(frozen=True)
class FrameRef:
    """Where the pictures of one unit are: an image file, or the ``unit.frames`` frames of a video that are encoded together.

    ``indices`` count the frames of a video in presentation order from 0; (0,) for an image. ``pictures`` are the frames' own
    files where the video is a folder or a list of pictures, else empty. Raises ``ValueError`` for another number of either than
    the unit has frames.
    """

    source: MediaName
    indices: tuple[int, ...]
    is_video: bool
    unit: Unit
    pictures: tuple[MediaName, ...] = ()

    def __post_init__(self) -> None:
        if len(self.indices) != self.unit.frames or len(self.pictures) not in (0, self.unit.frames):
            raise ValueError(
                f"{self.unit} has {self.unit.frames} frames, not {len(self.indices)} indices and {len(self.pictures)} files"
            )

    @property
    def tokens(self) -> int:
        """LLM tokens that the unit becomes."""
        return self.unit.tokens

    @property
    def cost(self) -> int:
        """What encoding the unit costs (patches), by which units are dealt to ranks."""
        return self.unit.cost


def references(
    source: MediaName,
    indices: Sequence[int] | np.ndarray,
    is_video: bool,
    units: Sequence[Unit],
    pictures: Sequence[MediaName] = (),
) -> tuple[FrameRef, ...]:
    """The frames ``indices`` of one medium dealt to its ``units`` in order; ``pictures`` are the files of all frames of the
    medium, if each has its own. Raises ``ValueError`` if the units have another number of frames."""
    refs, first = [], 0
    for unit in units:
        taken = tuple(int(index) for index in indices[first : first + unit.frames])
        refs.append(FrameRef(source, taken, is_video, unit, tuple(pictures[i] for i in taken) if pictures else ()))
        first += unit.frames
    if first != len(indices):
        raise ValueError(f"units of {first} frames are not those of {len(indices)} chosen frames")
    return tuple(refs)


@dataclass(frozen=True)
class Document:
    """One tokenized sample.

    ``token_ids`` int64 [L] holds MEDIA_TOKEN at visual-token places. ``labels`` int64 [L] are already shifted: ``labels[i]``
    is what token i must predict, or IGNORE. The unit of ``frames[j]`` fills ``frames[j].tokens`` consecutive places from
    ``frame_starts[j]`` (int64 [F], ascending). ``sample_id`` names the sample in logs.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    frames: tuple[FrameRef, ...]
    frame_starts: np.ndarray
    sample_id: str
    media: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Row:
    """Packed documents, each padded at its end (padding: token 0, label IGNORE; no real token attends to it).

    ``token_ids``, ``labels``, ``positions`` are int64 [S]; positions restart in each document. ``cu_seqlens`` int64 [D+1]
    are the padded document boundaries, ``lengths`` the D documents' tokens without padding; ``frame_starts`` int64 [F] are
    places in the row.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    frames: tuple[FrameRef, ...]
    frame_starts: np.ndarray
    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the row with padding."""
        return int(self.cu_seqlens[-1])

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(frame.unit for frame in self.frames)

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())


def pack(documents: Sequence[Document], document_multiple: int = 1, row_multiple: int = 1) -> Row:
    """Pack ``documents`` into one row.

    Each document is padded to a multiple of ``document_multiple`` (2*cp: Megatron's zigzag chunks); the last one is padded
    further until the row is a multiple of ``row_multiple`` (2*cp*tp: Megatron sequence parallelism) as well.

    Raises ``ValueError`` for an empty list, an empty document or multiples that do not nest.
    """
    if not documents:
        raise ValueError("pack() needs at least one document")
    if row_multiple % document_multiple:
        raise ValueError(f"row_multiple={row_multiple} must be a multiple of document_multiple={document_multiple}")
    empty = [d.sample_id for d in documents if len(d) == 0]
    if empty:
        raise ValueError(f"documents without tokens cannot be packed: {', '.join(empty)}")
    lengths = [-(-len(d) // document_multiple) * document_multiple for d in documents]
    lengths[-1] += -sum(lengths) % row_multiple
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(cu_seqlens[-1])
    token_ids = np.zeros(total, dtype=np.int64)
    labels = np.full(total, IGNORE, dtype=np.int64)
    for start, document in zip(cu_seqlens[:-1], documents, strict=True):
        token_ids[start : start + len(document)] = document.token_ids
        labels[start : start + len(document)] = document.labels
    positions = np.arange(total, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    starts = [d.frame_starts.astype(np.int64) + s for s, d in zip(cu_seqlens[:-1], documents, strict=True)]
    return Row(
        token_ids=token_ids,
        labels=labels,
        positions=positions,
        cu_seqlens=cu_seqlens,
        frames=tuple(f for d in documents for f in d.frames),
        frame_starts=np.concatenate(starts),
        sample_ids=tuple(d.sample_id for d in documents),
        lengths=tuple(len(d) for d in documents),
    )

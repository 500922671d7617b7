"""Samples as documents: everything about a sample but its pixels.

A document is made from metadata alone (text, the frame table of a video), so every rank of a model-parallel block makes the same
one without talking to the others. A sample that cannot be used is replaced by the next good one in the order of the records:
a pure function of the index and of which samples are bad, whenever and wherever that was found out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vila.config.schema import DataConfig, ModelConfig
from megatron_vila.data.chat import ChatEncoder, RenderError, assemble
from megatron_vila.data.media import MediaError, errors_of
from megatron_vila.data.records import Media, Record
from megatron_vila.data.row import IGNORE, Document, FrameRef
from megatron_vila.data.sampling import sample_frame_indices, thin_out, uneven_seconds
from megatron_vila.data.video import probe_video
from megatron_vila.errors import SettingError, UserError
from megatron_vila.models.geometry import patches_per_side, tokens_per_frame


class NoUsableSampleError(UserError, RuntimeError):
    """Every sample that could stand at a place of a row is broken or too long; ``found`` as in ``Choice``."""

    def __init__(self, message: str, found: dict[int, str]) -> None:
        super().__init__(message)
        self.found = found


class TooLongError(Exception):
    """A sample does not fit train.seq_length, and data.over_long does not let it be cut, or not far enough."""


@dataclass(frozen=True)
class Choice:
    """The sample that stands at a place of a row.

    ``index`` is the record in ``document``; ``replaced`` says why it is not the one asked for ("", "broken" or "too_long");
    ``found`` maps the broken records met on the way, beyond those already known, to what is wrong with them; ``dropped_frames``
    counts the frames taken out to make the sample fit.
    """

    index: int
    document: Document
    replaced: str
    found: dict[int, str]
    dropped_frames: int

    @property
    def supervised(self) -> bool:
        """Whether any token of the document is trained."""
        return bool((self.document.labels != IGNORE).any())


class VilaDataset:
    """Documents of ``records``, tokenised by ``tokenizer`` for ``model``, of at most ``seq_length`` tokens. Safe for threads.

    Raises ``ChatTemplateError`` for a tokenizer without a usable chat template, ``ValueError`` for settings that do not fit.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        model: ModelConfig,
        seq_length: int,
    ) -> None:
        if data.over_long not in ("truncate", "drop"):
            raise SettingError(f"data.over_long={data.over_long} is unknown; use truncate or drop")
        self.records, self.data, self.seq_length = records, data, seq_length
        self.encoder = ChatEncoder(tokenizer)
        self.vocab_size = model.llm.vocab_size
        self.frame_tokens = tokens_per_frame(model.vision, model.projector)
        self.frame_cost = patches_per_side(model.vision) ** 2
        self.probe = functools.lru_cache(maxsize=64)(probe_video)
        for name in ("frame_separator_ids", "image_separator_ids"):
            self._check_vocabulary(np.array(getattr(data, name), dtype=np.int64), f"data.{name}")

    def __len__(self) -> int:
        return len(self.records)

    def document(self, index: int) -> Document:
        """The document of record ``index``, or of the one that replaces it. Reads no pixel."""
        return self.choose(index).document

    def choose(
        self,
        index: int,
        broken: Mapping[int, str] | None = None,
        limit: int | None = None,
        lengths: np.ndarray | None = None,
    ) -> Choice:
        """The first usable record from ``index`` on, going round at the end.

        ``broken`` maps records that are known to fail to the reason. A packed row passes ``limit``, the tokens that it has
        room for, with ``lengths``, the table it was packed by, which spares making documents that will not fit.

        Raises ``NoUsableSampleError`` if there is none, ``ValueError`` for token ids outside the model's vocabulary.
        """
        broken, found, too_long, replaced = broken or {}, {}, 0, ""
        for candidate in ((index + step) % len(self) for step in range(len(self))):
            if candidate in broken:
                replaced = replaced or "broken"
                continue
            if lengths is not None and lengths[candidate] > limit:
                continue
            try:
                document, dropped_frames = self._build(self.records[candidate])
            except (MediaError, RenderError) as error:
                found[candidate] = str(error)
                replaced = replaced or "broken"
            except TooLongError:
                too_long += 1
                replaced = replaced or "too_long"
            else:
                if limit is None or len(document) <= limit:
                    return Choice(candidate, document, replaced, found, dropped_frames)
        problems = [*broken.values(), *found.values()]
        raise NoUsableSampleError(
            f"none of the {len(self)} samples can be used: {len(problems)} are broken, {too_long} do not fit "
            f"train.seq_length={self.seq_length}" + "".join(f"\n  {reason}" for reason in problems[:3]),
            found,
        )

    def _build(self, record: Record) -> tuple[Document, int]:
        """The document of a record and the number of frames left out to make it fit."""
        segments = self.encoder.encode(record.turns)
        chosen = [self._frame_indices(medium) for medium in record.media]
        is_video = [medium.is_video for medium in record.media]
        image_tokens = self.frame_tokens + len(self.data.image_separator_ids)
        frame_tokens = self.frame_tokens + len(self.data.frame_separator_ids)
        room = self.seq_length - sum(len(s.token_ids) for s in segments) - is_video.count(False) * image_tokens
        counts = [len(indices) for indices, video in zip(chosen, is_video, strict=True) if video]
        if room < 0 or (self.data.over_long == "drop" and sum(counts) * frame_tokens > room):
            raise TooLongError
        kept = iter(share_frames(counts, room // frame_tokens))
        taken = [
            self._thin_out(m, i, next(kept)) if m.is_video else i for m, i in zip(record.media, chosen, strict=True)
        ]
        pictures = [
            tuple(FrameRef(m.path, int(i), self.frame_tokens, self.frame_cost, m.is_video) for i in indices)
            for m, indices in zip(record.media, taken, strict=True)
        ]
        document = assemble(
            segments, pictures, self.data.image_separator_ids, self.data.frame_separator_ids, record.sample_id
        )
        if not len(document):
            raise RenderError(f"sample {record.sample_id} renders to no token")
        self._check_vocabulary(document.token_ids, f"sample {record.sample_id}")
        return document, sum(map(len, chosen)) - len(document.frames)

    def _frame_indices(self, medium: Media) -> np.ndarray:
        if medium.is_video:
            video = self.probe(medium.path)
            return sample_frame_indices(video, self.data.num_frames, self.data.fps, self.data.fps_rule)
        with errors_of(medium.path, "cannot be read"):
            size = os.stat(medium.path).st_size
        if not size:
            raise MediaError(medium.path, "the file is empty (0 bytes)")
        return np.zeros(1, dtype=np.int64)

    def _thin_out(self, medium: Media, indices: np.ndarray, count: int) -> np.ndarray:
        """At most ``count`` of the frames ``indices``: evenly in time where a rate is asked for, else evenly by number."""
        seconds = uneven_seconds(self.probe(medium.path)) if self.data.fps and count < len(indices) else None
        return thin_out(indices, count, seconds)

    def _check_vocabulary(self, token_ids: np.ndarray, what: str) -> None:
        largest = int(token_ids.max(initial=0))
        if largest >= self.vocab_size:
            raise SettingError(
                f"{what} holds token id {largest}, but model.llm.vocab_size={self.vocab_size}; "
                "use the tokenizer that belongs to the model, or a larger vocabulary"
            )


def share_frames(counts: Sequence[int], room: int) -> list[int]:
    """Frames to keep of videos with ``counts`` frames when there is room for ``room`` frames in all.

    One of each video, the rest in proportion to the counts (largest remainder). Raises ``TooLongError``
    if there is no room for one of each.
    """
    if sum(counts) <= room:
        return list(counts)
    if len(counts) > room:
        raise TooLongError
    beyond_one = np.array(counts) - 1
    exact = beyond_one * (room - len(counts)) / beyond_one.sum()
    kept = 1 + np.floor(exact).astype(np.int64)
    kept[np.argsort(np.floor(exact) - exact, kind="stable")[: room - kept.sum()]] += 1
    return kept.tolist()

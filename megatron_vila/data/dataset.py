"""Samples as documents: everything about a sample but its pixels.

A document is made from metadata alone (text, the frame table of a video), so every rank of a model-parallel block makes the same
one without talking to the others. Whatever one sample raises makes that sample broken and nothing else.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_vila.config.schema import DataConfig, ModelConfig
from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.chat import ChatEncoder, RenderError, assemble
from megatron_vila.data.failures import FailureReasons, MachineError
from megatron_vila.data.fields import Media
from megatron_vila.data.frame_chooser import FrameChooser
from megatron_vila.data.records import Record
from megatron_vila.data.sampling import thin_out, uneven_seconds
from megatron_vila.data.sources.source import ChangedFileError, Source
from megatron_vila.errors import SettingError, UserError
from megatron_vila.plan.pictures import Size, places
from megatron_vila.plan.row import IGNORE, Document


class NoUsableSampleError(UserError, RuntimeError):
    """Every sample is broken or too long."""


class TooLongError(UserError):
    """A sample does not fit train.seq_length, and data.over_long does not let it be cut, or not far enough."""


class BrokenSampleError(UserError):
    """A sample cannot be read or rendered; the text says why."""


@dataclass(frozen=True)
class Sample:
    """The ``document`` of record ``index``; ``dropped_frames`` counts the frames taken out to make it fit."""

    index: int
    document: Document
    dropped_frames: int

    @property
    def supervised(self) -> bool:
        """Whether any token of the document is trained."""
        return bool((self.document.labels != IGNORE).any())


class VilaDataset(FrameChooser):
    """Documents of ``records``, tokenized by ``tokenizer`` for ``model``, of at most ``seq_length`` tokens. Safe for threads.

    Raises ``ChatTemplateError`` for a tokenizer without a usable chat template, ``SettingError`` for settings that do not fit.
    """

    def __init__(
        self,
        records: Source,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        model: ModelConfig,
        seq_length: int,
    ) -> None:
        super().__init__(data, model)
        self.records, self.seq_length = records, seq_length
        self.encoder = ChatEncoder(tokenizer, TextRules.of(data))
        self.vocab_size = model.llm.vocab_size
        self.failures = FailureReasons()
        for name in ("frame_separator_ids", "image_separator_ids"):
            self._check_vocabulary(np.array(getattr(data, name), dtype=np.int64), f"data.{name}")

    def __len__(self) -> int:
        return len(self.records)

    def first_usable(self, index: int, broken: Mapping[int, str] | None = None) -> Sample:
        """The first sample from ``index`` on that can be used, going round at the end. It is to be shown: training leaves out
        those that cannot be used. ``broken`` maps records that are known to fail to the reason.

        Raises ``NoUsableSampleError`` if there is none, and as ``build``.
        """
        problems, too_long = {**self.records.bad, **(broken or {})}, 0
        for candidate in ((index + step) % len(self) for step in range(len(self))):
            if candidate in problems:
                continue
            try:
                return self.build(candidate)
            except BrokenSampleError as error:
                problems[candidate] = str(error)
            except TooLongError:
                too_long += 1
        raise NoUsableSampleError(
            f"none of the {len(self)} samples can be used: {len(problems)} are broken, {too_long} do not fit "
            f"train.seq_length={self.seq_length}" + "".join(f"\n  {reason}" for reason in list(problems.values())[:3])
        )

    def build(self, index: int) -> Sample:
        """Sample ``index``. Reads no pixel.

        Raises ``BrokenSampleError`` or ``TooLongError`` that say why it cannot be used, ``MachineError`` where the machine is at
        its end, ``ChangedFileError`` where a file of records is not what it was.
        """
        if index in self.records.bad:
            raise BrokenSampleError(self.records.bad[index])
        try:
            return Sample(index, *self._build(self.records.record(index)))
        except (TooLongError, MachineError, ChangedFileError):
            raise
        except Exception as error:
            raise BrokenSampleError(self.failures.reason(error, self.name(index))) from error

    def name(self, index: int) -> str:
        """The sample's id, or file and number of a record that cannot be read."""
        try:
            return self.records.record(index).sample_id
        except (UserError, OSError):
            return self.records.name(index)

    def _build(self, record: Record) -> tuple[Document, int]:
        """The document of a record and the number of frames left out to make it fit."""
        segments = self.encoder.encode(record.turns)
        chosen, files = zip(*map(self.choose_frames, record.media), strict=True) if record.media else ((), ())
        is_video = [medium.is_video for medium in record.media]
        sizes = list(map(self.size, record.media, chosen, files))
        room = self.seq_length - sum(len(s.token_ids) for s in segments)
        room -= sum(self._places(1, False, size) for size, video in zip(sizes, is_video, strict=True) if not video)
        counts = [len(indices) for indices, video in zip(chosen, is_video, strict=True) if video]
        counted = [
            functools.partial(self._places, is_video=True, size=size)
            for size, video in zip(sizes, is_video, strict=True)
            if video
        ]
        if room < 0:
            raise TooLongError(
                f"text and images alone have {self.seq_length - room} tokens, train.seq_length={self.seq_length}"
            )
        wanted = sum(tokens(count) for tokens, count in zip(counted, counts, strict=True))
        if self.data.over_long == "drop" and wanted > room:
            raise TooLongError(
                f"its {self.seq_length - room + wanted} tokens do not fit "
                f"train.seq_length={self.seq_length} and data.over_long=drop"
            )
        kept = iter(counts if wanted <= room else fit_frames(counts, room, counted))
        taken = [
            self._thin_out(medium, indices, next(kept), bool(names)) if medium.is_video else indices
            for medium, indices, names in zip(record.media, chosen, files, strict=True)
        ]
        pictures = [
            self.references(medium, indices, size, names)
            for medium, indices, size, names in zip(record.media, taken, sizes, files, strict=True)
        ]
        document = assemble(
            segments, pictures, self.data.image_separator_ids, self.data.frame_separator_ids, record.sample_id
        )
        if not len(document):
            raise RenderError(f"sample {record.sample_id} renders to no token")
        try:
            self._check_vocabulary(document.token_ids, f"sample {record.sample_id}")
        except SettingError as error:
            raise RenderError(str(error)) from error
        return document, sum(map(len, chosen)) - sum(map(len, taken))

    def _places(self, frames: int, is_video: bool, size: Size | None) -> int:
        """Tokens that a medium with ``frames`` frames of ``size`` takes, separators included."""
        separators = self.data.frame_separator_ids if is_video else self.data.image_separator_ids
        return places(self.pictures.units(frames, is_video, size), len(separators))

    def _thin_out(self, medium: Media, indices: np.ndarray, count: int, of_pictures: bool) -> np.ndarray:
        """At most ``count`` of the frames ``indices``: evenly in time where a rate is asked for, else evenly by number."""
        in_time = self.data.fps and count < len(indices) and not of_pictures
        seconds = uneven_seconds(self.probe(medium.path)) if in_time else None
        return thin_out(indices, count, seconds)

    def _check_vocabulary(self, token_ids: np.ndarray, what: str) -> None:
        largest = int(token_ids.max(initial=0))
        if largest >= self.vocab_size:
            raise SettingError(
                f"{what} holds token id {largest}, but model.llm.vocab_size={self.vocab_size}; "
                "use the tokenizer that belongs to the model, or a larger vocabulary"
            )


def fit_frames(counts: Sequence[int], room: int, places: Sequence[Callable[[int], int]]) -> list[int]:
    """Frames to keep of videos with ``counts`` frames whose tokens fit ``room``; ``places`` gives those of each video by frames.

    As many in all as fit, shared as ``share_frames`` does, which raises ``TooLongError``.
    """

    def too_many(frames: int) -> bool:
        shares = share_frames(counts, frames) if frames >= len(counts) else [1] * frames
        return sum(tokens(share) for tokens, share in zip(places, shares, strict=False)) > room

    return share_frames(counts, bisect_left(range(sum(counts) + 1), True, lo=1, key=too_many) - 1)


def share_frames(counts: Sequence[int], room: int) -> list[int]:
    """Frames to keep of videos with ``counts`` frames when there is room for ``room`` frames in all.

    Each video keeps at least one; the rest is shared in proportion to the counts (largest remainder). Raises ``TooLongError``
    if there is no room for one of each.
    """
    if sum(counts) <= room:
        return list(counts)
    if len(counts) > room:
        raise TooLongError(f"there is room for {room} frames, not for one of each of its {len(counts)} videos")
    beyond_one = np.array(counts) - 1
    exact = beyond_one * (room - len(counts)) / beyond_one.sum()
    kept = 1 + np.floor(exact).astype(np.int64)
    kept[np.argsort(np.floor(exact) - exact, kind="stable")[: room - kept.sum()]] += 1
    return kept.tolist()

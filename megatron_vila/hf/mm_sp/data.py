"""The data collator of MM-SP under Transformers: whole samples in, this rank's share of one packed row out.

Samples become the documents of a row, each padded to a multiple of 2*cp tokens at its end and cut zigzag (Megatron-Core's
layout, ``plan/tokens.py``). Labels are shifted on the whole document before the cut. All of this, with the plan of the row
(``plan/row_plan.py``), is computed on the host without communication, so it runs in the workers of a DataLoader.

Legend: S tokens of the row, s = S/cp local tokens, n supervised ones among them, D documents, N visual tokens made by a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vila.hf.mm_sp.same_row import fingerprint
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, Document, Row, pack, references
from megatron_vila.plan.row_plan import AttentionPlan, RowPlan, ShardPlan
from megatron_vila.plan.tokens import RankReshard

KEYS = ("input_ids", "labels", "attention_mask", "pixel_values_videos")


@dataclass(frozen=True)
class VideoTokens:
    """How a model writes videos into its token sequence.

    A video of F frames takes F * ``per_frame`` + ``after_video`` tokens, all of them ``token_id``. A frame is a picture
    [3, ``size``, ``size``].
    """

    token_id: int
    per_frame: int
    after_video: int
    size: int


@dataclass(frozen=True)
class FramePlan:
    """What a rank does with the videos of a row.

    ``order`` int64 [N] has, for each token that the rank makes, in the order of the row, its index in what the rank encodes: the
    tokens of its frames and then one newline. ``reshard`` sends these tokens to the ranks that own them. ``most`` is the largest
    number of frames that a rank has.
    """

    reshard: RankReshard
    order: np.ndarray
    most: int


@dataclass(frozen=True)
class ShardedRow:
    """What a rank knows of a row, in host memory; it goes through the model's forward as ``mm_sp_row``.

    ``cu_seqlens`` int64 [D+1] are the bounds of the documents. ``positions`` int64 [s] are the places of the local tokens in the
    row, ``selected`` int64 [n] the indices of the supervised ones among the local tokens. ``supervised`` and ``tokens`` (without
    padding) count tokens of the whole row, ``longest`` those of its longest document. ``fingerprint`` is the same on all ranks
    that were given the same samples (``same_row.py``). ``attention`` and, for a video model, ``frames`` are this rank's part of
    the plan of the row, which the training process copies to its device.
    """

    cu_seqlens: np.ndarray
    positions: np.ndarray
    selected: np.ndarray
    supervised: int
    tokens: int
    longest: int
    fingerprint: np.ndarray
    attention: AttentionPlan
    frames: FramePlan | None


@dataclass(frozen=True)
class _Document:
    ids: np.ndarray
    labels: np.ndarray
    has_labels: bool
    videos: Sequence[Any]


@dataclass(frozen=True)
class ShardCollator:
    """``collate_fn`` for rank ``rank`` of ``grid``, whose ulysses x ring ranks share a sample.

    A sample is a mapping with ``input_ids`` [L] (or [1, L]) and, for training, ``labels`` of the same shape in the convention of
    Transformers: not shifted, -100 where nothing is learned. Tokens whose ``attention_mask`` is 0 are taken out, so padding on
    either side is fine. For a video model ``pixel_values_videos`` holds the videos, each a tensor [F, 3, H, W] or anything with
    a length whose slices are such tensors: only this rank's frames are read.

    Returns ``input_ids``, ``position_ids`` and (if the samples have them) ``labels``, int64 [1, s] each, labels shifted;
    ``pixel_values_videos`` [f, 3, H, W] with this rank's f frames for a video model; ``mm_sp_row``. All ranks that share a
    sample must be given the same samples, which the model's forward checks. Raises ``ValueError`` that lists everything wrong
    with the samples.
    """

    grid: GridShape
    rank: int
    video: VideoTokens | None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        problems: list[str] = []
        documents = [self._document(sample, f"sample {i}", problems) for i, sample in enumerate(samples)]
        if not samples:
            problems.append("the batch has no samples; give at least one")
        if len({document.has_labels for document in documents}) > 1:
            problems.append(
                "some samples have labels and some have none; give all of them labels (-100 where nothing is learned)"
            )
        if problems:
            raise ValueError("MM-SP cannot shard this batch: " + "; ".join(problems))
        row = pack([self._placed(document) for document in documents], self.grid.document_multiple, self.grid.row_multiple)
        has_labels = documents[0].has_labels
        batch = self.share(row, [video for document in documents for video in document.videos], has_labels=has_labels)
        if has_labels:
            batch["labels"] = _tensor(row.labels[batch["mm_sp_row"].positions])
        return batch

    def prompt(self, sample: Mapping[str, Any], name: str) -> tuple[Document, Sequence[Any]]:
        """A sample as a document by itself, and its videos. ``name`` is what messages call it.

        Raises ``ValueError`` that lists everything wrong with the sample.
        """
        problems: list[str] = []
        document = self._document(sample, name, problems)
        if problems:
            raise ValueError("MM-SP cannot read this prompt: " + "; ".join(problems))
        return self._placed(document), document.videos

    def share(self, row: Row, videos: Sequence[Any], first_frame: int = 0, has_labels: bool = False) -> dict[str, Any]:
        """This rank's share of ``row``, but for its labels. The frames of the row are those of ``videos`` from number
        ``first_frame`` on."""
        if self.video is not None and self.video.token_id == 0:
            _fill(row)
        plan = RowPlan.of(row, self.grid)
        places, part = plan.places(self.rank), plan.shard(self.rank)
        batch = {
            "input_ids": _tensor(row.token_ids[places]),
            "position_ids": _tensor(part.positions),
            "mm_sp_row": ShardedRow(
                cu_seqlens=row.cu_seqlens,
                positions=places,
                selected=part.selected,
                supervised=row.supervised_tokens,
                tokens=sum(row.lengths),
                longest=max(row.lengths),
                fingerprint=fingerprint(row, videos, has_labels),
                attention=part.attention,
                frames=self._frames(videos, first_frame, plan, part),
            ),
        }
        if self.video is not None:
            mine = range(first_frame + part.frames.start, first_frame + part.frames.stop)
            batch["pixel_values_videos"] = self._pixels(videos, mine, self.video.size)
        return batch

    def _document(self, sample: Mapping[str, Any], name: str, problems: list[str]) -> _Document:
        for key in sorted(set(sample) - set(KEYS)):
            hint = "; give a picture as a video of one frame" if key == "pixel_values" else ""
            problems.append(f"{name} has {key}, which MM-SP cannot shard (it knows {', '.join(KEYS)}){hint}")
        if "input_ids" not in sample:
            problems.append(f"{name} has no input_ids; give its token ids")
            return _Document(np.zeros(0, np.int64), np.zeros(0, np.int64), False, ())
        ids = _flat(sample["input_ids"])
        labels = _flat(sample["labels"]) if sample.get("labels") is not None else np.full(len(ids), IGNORE)
        mask = _flat(sample["attention_mask"]) if sample.get("attention_mask") is not None else np.ones(len(ids))
        for key, values in (("labels", labels), ("attention_mask", mask)):
            if len(values) != len(ids):
                problems.append(f"{name} has {len(values)} {key} for {len(ids)} input_ids; give one for each of them")
                return _Document(ids, ids, True, ())
        ids, labels = ids[mask != 0], labels[mask != 0]
        if not len(ids):
            problems.append(f"{name} has no token, or attention_mask takes out all of them; leave the sample out")
        videos = sample.get("pixel_values_videos")
        videos = () if videos is None else tuple(videos)
        problems += self._video_problems(ids, videos, name)
        shifted = np.append(labels[1:], IGNORE)
        return _Document(ids, shifted, sample.get("labels") is not None, videos)

    def _video_problems(self, ids: np.ndarray, videos: Sequence[Any], name: str) -> list[str]:
        if self.video is None:
            return [f"{name} has pixel_values_videos but the model takes text only; leave them out"] if videos else []
        places = np.flatnonzero(ids == self.video.token_id)
        counts = _frame_tokens(videos, self.video)
        if len(places) != sum(counts):
            frames = ", ".join(str(len(video)) for video in videos) or "no"
            return [
                f"{name} has {len(places)} video tokens (id {self.video.token_id}) but videos of {frames} frames need "
                f"{sum(counts)}: {self.video.per_frame} for each frame and {self.video.after_video} after each video"
            ]
        starts = np.cumsum([0, *counts])[:-1]
        broken = [f for f, n in enumerate(counts) if places[starts[f] + n - 1] - places[starts[f]] != n - 1]
        return [f"{name}: the tokens of frame {broken[0]} are not consecutive; put no text between them"] if broken else []

    def _placed(self, document: _Document) -> Document:
        """The document with its frames, each at the place of its first token."""
        tokens: list[int] = []
        starts = np.zeros(0, dtype=np.int64)
        if self.video is not None and (tokens := _frame_tokens(document.videos, self.video)):
            starts = np.flatnonzero(document.ids == self.video.token_id)[np.cumsum([0, *tokens])[:-1]]
        units = [Unit(frames=1, tiles=1, tokens=count, cost=1) for count in tokens]
        return Document(document.ids, document.labels, references("", range(len(units)), True, units), starts, "")

    def _frames(self, videos: Sequence[Any], first_frame: int, plan: RowPlan, part: ShardPlan) -> FramePlan | None:
        if self.video is None:
            return None
        per_frame, mine = self.video.per_frame, part.frames
        ends = [i + 1 == len(video) for video in videos for i in range(len(video))]
        order = [np.zeros(0, dtype=np.int64)]
        for number, frame in enumerate(mine):
            order.append(np.arange(number * per_frame, (number + 1) * per_frame))
            if ends[first_frame + frame]:
                order.append(np.full(self.video.after_video, len(mine) * per_frame))
        most = int(np.diff(plan.reshard.boundaries).max())
        return FramePlan(part.reshard, np.concatenate(order), most)

    def _pixels(self, videos: Sequence[Any], frames: range, size: int) -> torch.Tensor:
        """This rank's frames; no other frame is touched."""
        first, last = frames.start, frames.stop
        parts, start = [], 0
        for video in videos:
            low, high = max(first - start, 0), min(last - start, len(video))
            if low < high:
                parts.append(torch.as_tensor(video[low:high]))
            start += len(video)
        shape = (3, size, size)
        wrong = [tuple(part.shape) for part in parts if tuple(part.shape[1:]) != shape]
        if wrong:
            raise ValueError(
                f"frames have shape {wrong[0]} but the model's vision tower takes [frames, {shape[0]}, {shape[1]}, {shape[2]}]; "
                "resize them"
            )
        return torch.cat(parts) if parts else torch.zeros(0, *shape)


def _frame_tokens(videos: Sequence[Any], tokens: VideoTokens) -> list[int]:
    """Tokens of each frame; the tokens after a video go with its last frame."""
    counts = []
    for video in videos:
        counts += [tokens.per_frame] * len(video)
        if len(video):
            counts[-1] += tokens.after_video
    return counts


def _flat(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int64).reshape(-1)


def _fill(row: Row) -> None:
    """Fill the padding of ``row`` with token 1, for a model in which the usual token 0 stands for a video."""
    for start, length, end in zip(row.cu_seqlens[:-1], row.lengths, row.cu_seqlens[1:], strict=True):
        row.token_ids[start + length : end] = 1


def _tensor(values_s: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values_s, dtype=np.int64))[None]

"""Samples for the MM-SP example: windows of text files, and questions about videos whose frames are decoded when asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from megatron_vila.data.images import preprocess
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video import decode_video_frames, probe_video
from megatron_vila.hf.mm_sp.adapters.llava_onevision import LlavaOnevision
from megatron_vila.models.vision.tower import scale_pixels
from megatron_vila.plan.row import IGNORE


class TextWindows(Dataset):
    """The tokens of all files one after the other, cut into windows of ``length``; every token is learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], length: int) -> None:
        ids: list[int] = []
        for file in files:
            ids += tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        # A long window over a small text repeats it.
        while len(ids) < length:
            ids += ids
        self._windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


class VideoFrames:
    """The frames of a video as the tower takes them, float32 [F, 3, size, size]; a slice decodes its frames and no others."""

    def __init__(self, path: Path, frames: int, size: int) -> None:
        self._info, self._size = probe_video(path), size
        self._indices = sample_frame_indices(self._info, frames)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, part: slice) -> torch.Tensor:
        frames = decode_video_frames(self._info.source, self._indices[part], self._info)
        return scale_pixels(preprocess(frames, self._size))


class VideoQuestions(Dataset):
    """Samples of a LLaVA-format file with one video and one question each, in LLaVA-OneVision's ChatML; answers are learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: Path, frames: int, video: LlavaOnevision) -> None:
        self._records = [record for record in json.loads(file.read_text(encoding="utf-8")) if "video" in record]
        if not self._records:
            raise ValueError(f"{file} has no record with a video")
        self._tokenizer, self._folder, self._frames, self._video = tokenizer, file.parent, frames, video

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        question, answer = (turn["value"].replace("<video>\n", "") for turn in record["conversations"][:2])
        frames = VideoFrames(self._folder / record["video"], self._frames, self._video.size)
        before = self._ids("<|im_start|>user\n")
        media = [self._video.token_id] * (len(frames) * self._video.per_frame + self._video.after_video)
        asked = self._ids(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")
        learned = self._ids(f"{answer}<|im_end|>\n")
        prompt = before + media + asked
        return {
            "input_ids": prompt + learned,
            "labels": [IGNORE] * len(prompt) + learned,
            "pixel_values_videos": [frames],
        }

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

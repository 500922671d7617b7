"""What the scripts beside this file share: Qwen2.5-VL, questions about long videos, and patches that are read when asked for.

Without --model the model is tiny and random, and without --data small videos are written; so every script runs in seconds on
two CPU processes.

Legend: t temporal patches of a video (two frames each), h and w patches of a side, m patches of a side that become one token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.synthetic import corpus, write_synthetic_set
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.data.video import decode_video_frames, probe_video

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2.5-VL's own
IGNORE = -100


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Qwen2.5-VL; without it a tiny random one")
    parser.add_argument("--data", type=Path, help="LLaVA-format JSON file; without it small videos are written")
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8, help="frames of a video; an even number")
    parser.add_argument("--side", type=int, default=56, help="side of a frame in pixels, a multiple of 28")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--workers", type=int, default=2, help="processes that read videos for each training process")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/hf_mm_sp/qwen"))
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Path, list[dict[str, Any]]]:
    """Folder of the tokenizer, and records with the keys video, question and answer. The first process writes what is missing,
    the others wait for it."""
    file = options.data or options.out / f"data/train_{options.frames}.json"
    if dist.get_rank() == 0 and not options.model:
        train_tokenizer(corpus(), options.out / "tokenizer", 1024)
    if dist.get_rank() == 0 and not options.data:
        write_synthetic_set(options.out / "data", [options.frames], train=16, evaluation=0)
    dist.barrier()
    records = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        question, answer = (turn["value"].replace("<video>\n", "") for turn in record["conversations"][:2])
        records.append({"video": str(file.parent / record["video"]), "question": question, "answer": answer})
    return options.model or options.out / "tokenizer", records


def build_model(options: argparse.Namespace, vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model in float32; random weights are equal in all processes."""
    if options.model:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    text = {
        "vocab_size": vocabulary + 4, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "window_size": 56,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), range(4), strict=True))
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **{name: vocabulary + number for name, number in ids.items()}
    )
    return Qwen2_5_VLForConditionalGeneration(config)


class VideoPatches:
    """The patches of a video as Qwen2.5-VL takes them, float32 [t * h * w, 3 * 2 * patch * patch].

    A slice decodes the frames of its temporal patches and no others, so each process reads its own frames only.
    """

    def __init__(self, path: str, frames: int, side: int, config: Qwen2_5_VLConfig) -> None:
        self._info, self._side, vision = probe_video(path), side, config.vision_config
        self._patch, self._merge = vision.patch_size, vision.spatial_merge_size
        self._indices = sample_frame_indices(self._info, frames)
        if len(self._indices) % 2:  # the processor repeats the last frame, too
            self._indices = np.append(self._indices, self._indices[-1])
        self.grid = (len(self._indices) // 2, side // self._patch, side // self._patch)
        self.tokens = len(self) // self._merge**2
        seconds = self._info.num_frames / self._info.fps
        self.seconds_per_step = seconds / self.grid[0]

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        size = self.grid[1] * self.grid[2]
        first, last, _ = rows.indices(len(self))
        steps = range(first // size, -(-last // size))
        indices = self._indices[2 * steps.start : 2 * steps.stop]
        pictures = [picture.resize((self._side, self._side)) for picture in decode_video_frames(self._info.source, indices)]
        made = patches(pictures, self._patch, self._merge)
        return made[first - steps.start * size : last - steps.start * size]


def patches(pictures: Sequence[Any], patch: int, merge: int) -> torch.Tensor:
    """Patches of an even number of RGB pictures of one size, in the order of Qwen's processor: the m * m patches of a token
    stand together."""
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    values = (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    t, h, w = len(pictures) // 2, values.shape[2] // patch, values.shape[3] // patch
    split = values.view(t, 2, 3, h // merge, merge, patch, w // merge, merge, patch)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 3 * 2 * patch * patch)


class VideoQuestions(Dataset):
    """Samples for MM-SP: a video and a question, of which the answer is learned. Pixels stay unread."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        config: Qwen2_5_VLConfig,
        options: argparse.Namespace,
    ) -> None:
        self._records, self._tokenizer, self._config, self._options = records, tokenizer, config, options

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(self._records[index])

    def sample(self, record: dict[str, Any]) -> dict[str, Any]:
        config = self._config
        video = VideoPatches(record["video"], self._options.frames, self._options.side, config)
        media = [config.vision_start_token_id, *[config.video_token_id] * video.tokens, config.vision_end_token_id]
        asked = self._ids("<|im_start|>user\n") + media + self._ids(f"{record['question']}<|im_end|>\n<|im_start|>assistant\n")
        learned = self._ids(f"{record['answer']}<|im_end|>\n")
        return {
            "input_ids": asked + learned,
            "labels": [IGNORE] * len(asked) + learned,
            "pixel_values_videos": [video],
            "video_grid_thw": [video.grid],
            "second_per_grid_ts": [video.seconds_per_step],
        }

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)

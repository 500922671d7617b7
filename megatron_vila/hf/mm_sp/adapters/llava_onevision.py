"""LLaVA-OneVision: a video of F frames takes F times as many tokens as a frame, and one newline token behind the last.

Pictures are taken as videos of one frame: the model cuts a picture into tiles of which it makes other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from megatron_vila.accelerator import to_device
from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit


@dataclass(frozen=True)
class LlavaOnevision(VisionAdapter):
    """A unit is a frame [3, ``size``, ``size``] of ``per_frame`` tokens ``token_id``; the last one of a video has ``after_video``
    more."""

    token_id: int
    per_frame: int
    after_video: int
    size: int

    keys = ("pixel_values_videos",)
    hints = {"pixel_values": "give a picture as a video of one frame"}
    text_models = ("llama", "qwen2", "qwen3")
    options = ("vision_feature_layer", "vision_feature_select_strategy")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        # The model halves each side of the patch grid.
        side = -(-(config.vision_config.image_size // config.vision_config.patch_size) // 2)
        return cls(config.video_token_id, side * side, 1, config.vision_config.image_size)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.token_id,)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        videos = sample.get("pixel_values_videos")
        videos = () if videos is None else tuple(videos)
        units = [
            (self._unit(ends=frame + 1 == len(video)), video, frame) for video in videos for frame in range(len(video))
        ]
        places = np.flatnonzero(ids == self.token_id)
        counts = [unit.tokens for unit, *_ in units]
        if len(places) != sum(counts):
            frames = ", ".join(str(len(video)) for video in videos) or "no"
            raise ValueError(
                f"has {len(places)} video tokens (id {self.token_id}) but videos of {frames} frames need {sum(counts)}: "
                f"{self.per_frame} for each frame and {self.after_video} after each video"
            )
        firsts = np.cumsum([0, *counts])[:-1]
        broken = [f for f, n in enumerate(counts) if places[firsts[f] + n - 1] - places[firsts[f]] != n - 1]
        if broken:
            raise ValueError(f"has tokens of frame {broken[0]} that are not consecutive; put no text between them")
        starts = places[firsts].tolist() if units else []
        return [Piece(unit, start, video, frame) for (unit, video, frame), start in zip(units, starts, strict=True)]

    def _unit(self, ends: bool) -> VisionUnit:
        return VisionUnit(1, self.per_frame + (self.after_video if ends else 0), cost=1, is_video=True, ends=ends)

    def blank(self) -> VisionUnit:
        return self._unit(ends=True)

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        made_NH = model.get_video_features(pixels[None], return_dict=True, **options).pooler_output[0]
        order = []
        for number, unit in enumerate(units):
            order.append(np.arange(number * self.per_frame, (number + 1) * self.per_frame))
            if unit.ends:  # the newline is the last of what the model makes
                order.append(np.full(self.after_video, len(units) * self.per_frame))
        return made_NH.index_select(0, to_device(torch.from_numpy(np.concatenate(order)), made_NH.device))

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=features_MC[None])}}

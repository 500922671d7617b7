"""VILA, this project's own model for transformers: each picture and each frame of a video takes as many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.adapters.places import starts_of


@dataclass(frozen=True)
class Vila(VisionAdapter):
    """A unit is a picture or frame [3, ``size``, ``size``], of ``per_picture`` tokens."""

    ids: tuple[int, int]
    per_picture: int
    size: int

    keys = ("pixel_values",)
    text_models = ("llama", "qwen2")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        ids = config.image_token_id, config.video_token_id
        return cls(ids, config.tokens_per_frame, config.vision_config.image_size)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.ids

    @property
    def unlearned(self) -> tuple[int, ...]:
        return self.ids

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        pixels = sample.get("pixel_values")
        count = 0 if pixels is None else len(pixels)
        places_N = np.flatnonzero(np.isin(ids, self.ids))
        need = f"{count} pictures of {self.per_picture} tokens"
        starts = starts_of(places_N, [self.per_picture] * count, "visual tokens", need)
        return [Piece(self.blank(), start, pixels, number) for number, start in enumerate(starts)]

    def blank(self) -> VisionUnit:
        return VisionUnit(rows=1, tokens=self.per_picture, cost=1, is_video=False, ends=True)

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        features_NH: torch.Tensor = model.get_image_features(pixels).pooler_output.flatten(0, 1)
        return features_NH

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features_MC)}}

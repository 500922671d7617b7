"""InternVL 3 and 3.5: a picture is cut into tiles, a frame of a video is one tile, and each tile takes as many tokens."""

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
class InternVL(VisionAdapter):
    """A unit is a tile [3, ``size``, ``size``], of ``per_tile`` tokens ``token_id``."""

    token_id: int
    per_tile: int
    size: int

    text_models = ("qwen2", "qwen3", "qwen3_moe")
    keys = ("pixel_values",)
    options = ("vision_feature_layer", "vision_feature_select_strategy")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        size, patch = (_side(getattr(config.vision_config, name)) for name in ("image_size", "patch_size"))
        return cls(config.image_token_id, int(size // patch * config.downsample_ratio) ** 2, size)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.token_id,)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        pixels = sample.get("pixel_values")
        count = 0 if pixels is None else len(pixels)
        places_N, what = np.flatnonzero(ids == self.token_id), f"visual tokens (id {self.token_id})"
        starts = starts_of(places_N, [self.per_tile] * count, what, f"{count} tiles of {self.per_tile} tokens")
        return [Piece(self.blank(), start, pixels, number) for number, start in enumerate(starts)]

    def blank(self) -> VisionUnit:
        return VisionUnit(rows=1, tokens=self.per_tile, cost=1, is_video=False, ends=True)

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        features: torch.Tensor = model.get_image_features(pixels, return_dict=True, **options).pooler_output
        return features.flatten(0, 1)

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features_MC[None])}}


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[0]

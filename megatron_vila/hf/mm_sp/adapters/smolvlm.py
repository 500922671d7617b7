"""SmolVLM2: a picture is cut into tiles, a frame of a video is one, and each takes as many tokens, padded or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.adapters.places import starts_of


@dataclass(frozen=True)
class SmolVLM(VisionAdapter):
    """A unit is a tile [3, ``size``, ``size``], of ``per_tile`` tokens ``token_id``. Its ``grid`` is the height and width in
    pixels of what is no padding."""

    token_id: int
    per_tile: int
    size: int

    text_models = ("llama",)
    keys = ("pixel_values", "pixel_attention_mask")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        return cls(config.image_token_id, side**2 // config.scale_factor**2, vision.image_size)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.token_id,)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        pixels, mask = _of_one(sample.get("pixel_values"), 5), _of_one(sample.get("pixel_attention_mask"), 4)
        count = 0 if pixels is None else len(pixels)
        places_N, what = np.flatnonzero(ids == self.token_id), f"visual tokens (id {self.token_id})"
        starts = starts_of(places_N, [self.per_tile] * count, what, f"{count} tiles of {self.per_tile} tokens")
        if mask is not None and len(mask) != count:
            raise ValueError(f"has {len(mask)} tiles in pixel_attention_mask for {count} in pixel_values; give one for each")
        units = [self.blank() if mask is None else self._unit(*_extent(np.asarray(mask[n]))) for n in range(count)]
        return [Piece(unit, start, pixels, n) for n, (unit, start) in enumerate(zip(units, starts, strict=True))]

    def check_rows(self, pixels: torch.Tensor) -> None:
        super().check_rows(pixels)
        if bool((pixels == 0).all(dim=-1).all(dim=-1).all(dim=-1).any()):
            raise ValueError(
                "a tile of pixel_values is all zeros, which this model takes for padding and leaves out; give each sample its "
                "own pixel_values, made without padding, and no picture of one middle gray"
            )

    def _unit(self, height: int, width: int) -> VisionUnit:
        return VisionUnit(1, self.per_tile, cost=1, is_video=False, ends=True, grid=(height, width))

    def blank(self) -> VisionUnit:
        return self._unit(self.size, self.size)

    def backbone(self, model: Any) -> nn.Module:
        text: nn.Module = model.model.text_model
        return text

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        mask = torch.zeros(len(units), self.size, self.size, dtype=torch.bool)
        for number, unit in enumerate(units):
            height, width = unit.grid
            mask[number, :height, :width] = True
        made = model.get_image_features(pixels[None], mask.to(pixels.device)[None], return_dict=True).pooler_output
        features: torch.Tensor = made[0]
        return features

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        pooled: Any = [features_MC]
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def _of_one(tensor: Any, axes: int) -> Any:
    """``tensor``, or lists of numbers, without the first axis, of one sample, that the processor gives it."""
    tensor = np.asarray(tensor, np.float32) if isinstance(tensor, list) else tensor
    return tensor[0] if getattr(tensor, "ndim", 0) == axes and len(tensor) == 1 else tensor


def _extent(mask: np.ndarray) -> tuple[int, int]:
    """Height and width of what ``mask`` [size, size] keeps, which must be the upper left part."""
    height, width = int(mask[:, 0].sum()), int(mask[0].sum())
    if int(mask.sum()) != height * width or not mask[:height, :width].all():
        raise ValueError("has a pixel_attention_mask that keeps no upper left part of a tile; use the model's processor")
    return height, width

"""LLaVA-NeXT-Video: frames are pooled; a picture is cut into tiles, loses its padding, and gets a newline behind each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next_video.modeling_llava_next_video import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.adapters.places import chosen, starts_of


@dataclass(frozen=True)
class LlavaNextVideo(VisionAdapter):
    """A unit is a frame of ``per_frame`` tokens ``video_id``, or a picture of several tiles, whose ``grid`` is its height and
    width in pixels before it was cut. Frames and tiles are rows [3, ``size``, ``size``] of ``side`` patches along each side."""

    image_id: int
    video_id: int
    per_frame: int
    size: int
    side: int
    pinpoints: tuple[tuple[int, int], ...]

    text_models = ("llama", "mistral", "qwen2")
    keys = ("pixel_values", "image_sizes", "pixel_values_videos")
    options = ("vision_feature_layer", "vision_feature_select_strategy")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        size, side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
        pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
        per_frame = (side // config.spatial_pool_stride) ** 2
        return cls(config.image_token_id, config.video_token_id, per_frame, size, side, pinpoints)

    @classmethod
    def problems(cls, config: PreTrainedConfig) -> list[str]:
        strategy = config.vision_feature_select_strategy
        if strategy == "full" and config.vision_config.model_type.startswith("clip"):
            return [
                f"vision_feature_select_strategy={strategy} leaves the token of the class among the patches of a frame, which "
                "are pooled as a square; set vision_feature_select_strategy=default"
            ]
        return []

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.image_id, self.video_id)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        return [*self._pictures(sample, ids), *self._frames(sample, ids)]

    def _pictures(self, sample: Mapping[str, Any], ids: np.ndarray) -> list[Piece]:
        pictures, sizes = sample.get("pixel_values"), sample.get("image_sizes")
        pictures = () if pictures is None else pictures
        sizes = [] if sizes is None else np.asarray(sizes).reshape(-1, 2).tolist()
        if len(sizes) != len(pictures):
            raise ValueError(f"has {len(pictures)} pictures in pixel_values but {len(sizes)} image_sizes; give one for each")
        units = [self._picture(height, width) for height, width in sizes]
        need = f"{len(pictures)} pictures of these image_sizes"
        starts = self._starts(ids, self.image_id, [unit.tokens for unit in units], "picture tokens", need)
        return [Piece(unit, start, pixels, 0) for unit, start, pixels in zip(units, starts, pictures, strict=True)]

    def _frames(self, sample: Mapping[str, Any], ids: np.ndarray) -> list[Piece]:
        videos = sample.get("pixel_values_videos")
        frames = [(video, number) for video in (() if videos is None else videos) for number in range(len(video))]
        need = f"videos of {len(frames)} frames"
        starts = self._starts(ids, self.video_id, [self.per_frame] * len(frames), "video tokens", need)
        unit = self.blank()
        return [Piece(unit, start, video, number) for (video, number), start in zip(frames, starts, strict=True)]

    def _starts(self, ids: np.ndarray, token_id: int, counts: list[int], what: str, need: str) -> list[int]:
        return starts_of(np.flatnonzero(ids == token_id), counts, f"{what} (id {token_id})", need)

    def _picture(self, height: int, width: int) -> VisionUnit:
        rows = image_size_to_num_patches((height, width), self._grid, self.size)
        down, across = get_anyres_image_grid_shape((height, width), self._grid, self.size)
        # The model takes the padding away; on a meta tensor that costs nothing.
        kept = unpad_image(torch.empty(1, down * self.side, across * self.side, device="meta"), (height, width))
        tokens = self.side**2 + kept.shape[1] * (kept.shape[2] + 1)
        return VisionUnit(rows, tokens, cost=rows, is_video=False, ends=True, grid=(height, width))

    @property
    def _grid(self) -> list[list[int]]:
        return [list(point) for point in self.pinpoints]

    def blank(self) -> VisionUnit:
        return VisionUnit(rows=1, tokens=self.per_frame, cost=1, is_video=True, ends=True)

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        # Pictures and frames go through the tower and the projector at once, as both may be sharded by themselves.
        given = {name: value for name, value in options.items() if value is not None}
        layer, strategy = (given.get(name, getattr(model.config, name)) for name in self.options)
        hidden = model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        layers = [layer] if isinstance(layer, int) else layer
        features = torch.cat([hidden[number] for number in layers], dim=-1)
        features = features[:, 1:] if strategy == "default" else features
        parts = features.split([unit.rows for unit in units])
        parts = [
            (model.vision_resampler(part) if unit.is_video else part).flatten(0, 1)
            for unit, part in zip(units, parts, strict=True)
        ]
        projected = model.multi_modal_projector(torch.cat(parts)).split([len(part) for part in parts])
        made = [
            part if unit.is_video else self._packed(model, part, unit, strategy)
            for unit, part in zip(units, projected, strict=True)
        ]
        # Pictures alone use the newline, frames alone what pools them; ranks must have gradients of the same weights.
        always = sum(weight.sum() for weight in (model.image_newline, *model.vision_resampler.parameters()))
        return torch.cat(made) + 0 * always

    def _packed(self, model: Any, part: torch.Tensor, unit: VisionUnit, strategy: str) -> torch.Tensor:
        tiles = part.unflatten(0, (unit.rows, -1))
        packed, _ = model.pack_image_features([tiles], torch.tensor([unit.grid]), strategy, image_newline=model.image_newline)
        features: torch.Tensor = packed[0]
        return features

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        pooled: dict[str, Any] = {"image": [chosen(features_MC, ~is_video_M)], "video": chosen(features_MC, is_video_M)[None]}
        return {"mm_encoder_outputs": {kind: BaseModelOutputWithPooling(pooler_output=x) for kind, x in pooled.items()}}

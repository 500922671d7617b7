"""VideoLLaMA 3: pictures and frames of any size, as rows of patches; a video may leave out tokens that hardly change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from megatron_vila.accelerator import to_device
from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit
from megatron_vila.hf.mm_sp.adapters.places import chosen, starts_of


@dataclass(frozen=True)
class VideoLlama3(VisionAdapter):
    """A unit is a picture or a frame: rows of ``row`` numbers, one for each patch. Its ``grid`` is its height and width in
    patches, the side of the squares of patches that become one token and, if some are left out, the numbers of the tokens that
    are kept."""

    image_id: int
    video_id: int
    row: int

    text_models = ("qwen2",)
    keys = (
        "pixel_values", "image_grid_thw", "image_merge_sizes",
        "pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask",
    )  # fmt: skip

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        vision = config.vision_config
        patch = (vision.patch_size,) * 2 if isinstance(vision.patch_size, int) else vision.patch_size
        return cls(config.image_token_id, config.video_token_id, vision.num_channels * prod(patch))

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.image_id, self.video_id)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.row,)

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        pictures = self._kind(sample, ids, "pixel_values", "image", self.image_id)
        return [*pictures, *self._kind(sample, ids, "pixel_values_videos", "video", self.video_id)]

    def check_rows(self, pixels: torch.Tensor) -> None:
        if tuple(pixels.shape[1:]) != self.row_shape:
            raise ValueError(
                f"patches have shape {tuple(pixels.shape)} but the model's vision tower takes [patches, {self.row}]; make them "
                "with the processor of this model"
            )

    def _kind(self, sample: Mapping[str, Any], ids: np.ndarray, key: str, kind: str, token_id: int) -> list[Piece]:
        pixels = sample.get(key)
        grids, merges = (_numbers(sample, f"{kind}_{name}") for name in ("grid_thw", "merge_sizes"))
        grids = grids.reshape(-1, 3)
        if len(grids) != len(merges):
            raise ValueError(f"has {len(grids)} {kind}_grid_thw but {len(merges)} {kind}_merge_sizes; give one for each")
        rows = 0 if pixels is None else len(pixels)
        if rows != int(grids.prod(axis=1).sum()):
            raise ValueError(f"has {rows} rows in {key} but {kind}_grid_thw tells of {int(grids.prod(axis=1).sum())}")
        frames = [(h, w, merge) for (t, h, w), merge in zip(grids.tolist(), merges.tolist(), strict=True) for _ in range(t)]
        kept = self._kept(sample, frames) if kind == "video" else [None] * len(frames)
        units = [self._unit(*frame, kind == "video", tokens) for frame, tokens in zip(frames, kept, strict=True)]
        first_rows = accumulate((unit.rows for unit in units[:-1]), initial=0)
        # A frame of which nothing is kept needs no encoding.
        wanted = [(unit, first) for unit, first in zip(units, first_rows, strict=False) if unit.tokens]
        counts, what = [unit.tokens for unit, _ in wanted], f"{kind} tokens (id {token_id})"
        starts = starts_of(np.flatnonzero(ids == token_id), counts, what, f"{len(units)} pictures or frames of these sizes")
        return [Piece(unit, start, pixels, first) for (unit, first), start in zip(wanted, starts, strict=True)]

    def _kept(self, sample: Mapping[str, Any], frames: list[tuple[int, int, int]]) -> list[tuple[int, ...] | None]:
        if sample.get("video_compression_mask") is None:
            return [None] * len(frames)
        mask, counts = _numbers(sample, "video_compression_mask"), [h * w // merge**2 for h, w, merge in frames]
        if len(mask) != sum(counts):
            raise ValueError(f"has a video_compression_mask of {len(mask)} tokens, but its videos have {sum(counts)}")
        return [tuple(np.flatnonzero(part).tolist()) for part in np.split(mask, np.cumsum(counts)[:-1])] if counts else []

    def _unit(self, height: int, width: int, merge: int, is_video: bool, kept: tuple[int, ...] | None) -> VisionUnit:
        tokens = height * width // merge**2
        if kept is None or len(kept) == tokens:
            kept = ()
        else:
            tokens = len(kept)
        grid = (height, width, merge, *kept)
        return VisionUnit(height * width, tokens, cost=height * width, is_video=is_video, ends=True, grid=grid)

    def blank(self) -> VisionUnit:
        return self._unit(1, 1, 1, False, None)

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        grids = torch.tensor([(1, *unit.grid[:2]) for unit in units], device=pixels.device)
        merges = torch.tensor([unit.grid[2] for unit in units], device=pixels.device)
        made = model.get_image_features(pixels, grids, merges, return_dict=True).pooler_output
        parts = []
        for unit, part in zip(units, made, strict=True):
            kept = unit.grid[3:]
            parts.append(part.index_select(0, to_device(torch.tensor(kept), part.device)) if kept else part)
        return torch.cat(parts)

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        pooled: dict[str, Any] = {"image": [chosen(features_MC, ~is_video_M)], "video": [chosen(features_MC, is_video_M)]}
        return {"mm_encoder_outputs": {kind: BaseModelOutputWithPooling(pooler_output=x) for kind, x in pooled.items()}}


def _numbers(sample: Mapping[str, Any], key: str) -> np.ndarray:
    value = sample.get(key)
    return np.zeros(0, np.int64) if value is None else np.asarray(value).reshape(-1).astype(np.int64)

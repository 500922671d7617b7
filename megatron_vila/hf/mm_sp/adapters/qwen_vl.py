"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense and mixture of experts): pictures and videos of any size.

A processor of these models cuts pictures into patches, two frames of a video together, and gives all patches of a sample as one
tensor, with the grid (t, h, w) of each picture or video. In the tower the patches of a *temporal patch*, t = 1, attend to each
other only, so that is the unit: a picture or two frames of a video. Pictures and videos go through the tower in the same way,
hence together. Positions have three axes (m-rope), and are made by the model's own ``get_rope_index``.

Legend: h, w patches of a side, m patches of a side that become one token, H width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures, Qwen3VLModel

from megatron_vila.accelerator import to_device
from megatron_vila.hf.mm_sp.adapters.base import Piece, VisionAdapter, VisionUnit

_TEXT, _PICTURE, _VIDEO = 0, 1, 2  # as in the processors' mm_token_type_ids


@dataclass(frozen=True)
class _Medium:
    """A picture or a video: its ``grid`` (t, h, w), its ``pixels`` and their first row."""

    grid: tuple[int, ...]
    pixels: Any
    first_row: int


@dataclass(frozen=True)
class QwenVL(VisionAdapter):
    """``merge`` is m, ``patch`` the numbers of a row of pixels, ``speed`` the positions of a second of video (0 where time does
    not count). ``levels`` counts the features of earlier layers of the tower, each as wide as a token."""

    picture_id: int
    video_id: int
    merge: int
    patch: int
    speed: int
    levels: int

    ignored = ("mm_token_type_ids",)
    stock: ClassVar[Any]
    """The model whose ``get_rope_index`` makes positions."""
    splits_videos: ClassVar[bool] = False
    """Whether text (a time) stands between the temporal patches of a video."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Self:
        vision = config.vision_config
        patch = vision.in_channels * _product(vision.temporal_patch_size) * _product(vision.patch_size, 2)
        return cls(
            config.image_token_id,
            config.video_token_id,
            vision.spatial_merge_size,
            patch,
            getattr(vision, "tokens_per_second", 0),
            len(getattr(vision, "deepstack_visual_indexes", ())),
        )

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (self.picture_id, self.video_id)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.patch,)

    def check_rows(self, pixels: torch.Tensor) -> None:
        if tuple(pixels.shape[1:]) != self.row_shape:
            raise ValueError(
                f"patches have shape {tuple(pixels.shape)} but the model's vision tower takes [patches, {self.patch}]; make them "
                "with the processor of this model"
            )

    def pieces(self, sample: Mapping[str, Any], ids: np.ndarray) -> Sequence[Piece]:
        pieces = []
        kinds = self._kinds(ids)
        for kind, name, key, grid_key in (
            (_PICTURE, "image", "pixel_values", "image_grid_thw"),
            (_VIDEO, "video", "pixel_values_videos", "video_grid_thw"),
        ):
            media = self._media(sample, key, grid_key)
            parts = kind == _VIDEO and self.splits_videos
            wanted = [tokens for medium in media for tokens in self._groups(medium.grid, parts)]
            starts, lengths = _runs(kinds == kind)
            told = f"{name} tokens (id {self.token_ids[kind - 1]})"
            if len(starts) != len(wanted):
                what = f"{grid_key} has {len(media)} rows" + (f" of {len(wanted)} temporal patches" if parts else "")
                raise ValueError(
                    f"has {len(starts)} groups of {told} but {what}; give each a group of its own, with other tokens between"
                )
            wrong = np.flatnonzero(lengths != np.array(wanted, np.int64))
            if len(wrong):
                first = int(wrong[0])
                raise ValueError(
                    f"has {lengths[first]} {told} in group {first} but {grid_key} needs {wanted[first]}, a token for "
                    f"{self.merge} x {self.merge} patches"
                )
            pieces += self._placed(media, starts, parts, kind == _VIDEO)
        return pieces

    def _kinds(self, ids: np.ndarray) -> np.ndarray:
        """Int64 [L]: what each token stands for."""
        return np.where(ids == self.picture_id, _PICTURE, np.where(ids == self.video_id, _VIDEO, _TEXT))

    def _tokens(self, grid: tuple[int, ...]) -> int:
        """Tokens of a temporal patch."""
        return grid[1] * grid[2] // self.merge**2

    def _groups(self, grid: tuple[int, ...], parts: bool) -> list[int]:
        """Tokens of a medium that stand together: all of them, or (``parts``) those of each temporal patch."""
        return [self._tokens(grid)] * grid[0] if parts else [grid[0] * self._tokens(grid)]

    def _media(self, sample: Mapping[str, Any], key: str, grid_key: str) -> list[_Medium]:
        """The pictures or videos of ``sample``. Raises ``ValueError`` if pixels and grids do not fit."""
        pixels, grids = sample.get(key), sample.get(grid_key)
        if pixels is None and grids is None:
            return []
        if pixels is None or grids is None:
            raise ValueError(f"has {key if grids is None else grid_key} without {grid_key if grids is None else key}; give both")
        rows = np.asarray(grids, dtype=np.int64).reshape(-1, 3)
        bad = [tuple(row) for row in rows.tolist() if min(row) < 1 or row[1] % self.merge or row[2] % self.merge]
        if bad:
            raise ValueError(f"has a row {bad[0]} of {grid_key}; height and width must be multiples of {self.merge} patches")
        sizes = rows.prod(axis=1)
        if isinstance(pixels, list | tuple) and any(_is_row(part) for part in pixels[:1]):
            pixels = torch.tensor(pixels)  # what the datasets library makes of a tensor
        if isinstance(pixels, list | tuple):
            if [len(part) for part in pixels] != sizes.tolist():
                found = ", ".join(str(len(part)) for part in pixels)
                raise ValueError(f"has {key} of {found} patches but {grid_key} needs {', '.join(str(size) for size in sizes)}")
            return [_Medium(tuple(row), part, 0) for row, part in zip(rows.tolist(), pixels, strict=True)]
        if len(pixels) != sizes.sum():
            raise ValueError(f"has {len(pixels)} patches in {key} but {grid_key} needs {sizes.sum()}")
        firsts = (np.cumsum(sizes) - sizes).tolist()
        return [_Medium(tuple(row), pixels, first) for row, first in zip(rows.tolist(), firsts, strict=True)]

    def _placed(self, media: Sequence[_Medium], starts: np.ndarray, parts: bool, is_video: bool) -> list[Piece]:
        """The temporal patches of ``media``, whose groups of tokens stand from ``starts`` on."""
        pieces, group = [], 0
        for medium in media:
            t, h, w = medium.grid
            for number in range(t):
                unit = VisionUnit(h * w, self._tokens(medium.grid), h * w, is_video, number + 1 == t, (h, w))
                inside = 0 if parts else number * unit.tokens
                pieces.append(Piece(unit, int(starts[group]) + inside, medium.pixels, medium.first_row + number * h * w))
                group += parts
            group += not parts
        return pieces

    def positions(self, sample: Mapping[str, Any], ids: np.ndarray, pieces: Sequence[Piece], first: int) -> np.ndarray | None:
        numbers = SimpleNamespace(spatial_merge_size=self.merge, tokens_per_second=self.speed)
        # What the model's method asks its own object for.
        light = SimpleNamespace(
            config=SimpleNamespace(vision_config=numbers),
            get_vision_position_ids=partial(self.stock.get_vision_position_ids, None),
        )
        grids = {
            key: torch.as_tensor(np.asarray(sample[key], dtype=np.int64).reshape(-1, 3))
            for key in ("image_grid_thw", "video_grid_thw")
            if sample.get(key) is not None
        }
        if "second_per_grid_ts" in self.keys:
            grids["second_per_grid_ts"] = self._seconds(sample, len(grids.get("video_grid_thw", ())))
        made, _ = self.stock.get_rope_index(
            light, torch.from_numpy(ids)[None], mm_token_type_ids=torch.from_numpy(self._kinds(ids))[None], **grids
        )
        positions: np.ndarray = made[:, 0].numpy() + first
        return positions

    def _seconds(self, sample: Mapping[str, Any], videos: int) -> Any:
        """Seconds from one temporal patch to the next, for each video; None for a sample without."""
        seconds = sample.get("second_per_grid_ts")
        if seconds is not None and len(seconds) != videos:
            raise ValueError(f"has {len(seconds)} second_per_grid_ts but {videos} videos; give one for each")
        return seconds

    def blank(self) -> VisionUnit:
        return VisionUnit(self.merge**2, 1, self.merge**2, False, True, (self.merge, self.merge))

    def encode(self, model: Any, pixels: torch.Tensor, units: Sequence[VisionUnit], options: Mapping[str, Any]) -> torch.Tensor:
        grid = to_device(torch.tensor([(1, *unit.grid) for unit in units]), pixels.device)
        made = model.get_image_features(pixels, grid, return_dict=True)
        levels = [made.pooler_output, *(made.deepstack_features if self.levels else ())]
        return torch.cat([torch.cat(tuple(level)) for level in levels], dim=1)

    def arguments(self, features_MC: torch.Tensor, is_video_M: np.ndarray) -> dict[str, Any]:
        outputs = {}
        for name, chosen_M in (("image", ~is_video_M), ("video", is_video_M)):
            order = to_device(torch.from_numpy(np.flatnonzero(chosen_M)), features_MC.device)
            levels = features_MC.index_select(0, order).chunk(1 + self.levels, dim=1)
            outputs[name] = self._output(levels)
        return {"mm_encoder_outputs": outputs}

    def _output(self, levels: Sequence[torch.Tensor]) -> Any:
        features: Any = (levels[0],)
        return BaseModelOutputWithPooling(pooler_output=features)

    def packed_tower(self, model: Any) -> nn.Module | None:
        return model.model.visual

    def start_decoding(self, model: Any, next_position: int, tokens: int) -> None:
        model.model.rope_deltas = torch.tensor([[next_position - tokens]], device=model.device)


_PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class Qwen2VL(QwenVL):
    keys = _PIXELS
    text_models = ("qwen2_vl_text",)
    stock = Qwen2VLModel


class Qwen25VL(QwenVL):
    keys = (*_PIXELS, "second_per_grid_ts")
    text_models = ("qwen2_5_vl_text",)
    stock = Qwen2_5_VLModel


class Qwen3VL(QwenVL):
    keys = _PIXELS
    text_models = ("qwen3_vl_text", "qwen3_vl_moe_text")
    stock = Qwen3VLModel
    splits_videos = True

    def _output(self, levels: Sequence[torch.Tensor]) -> Any:
        features: Any = (levels[0],)
        deepstack: Any = [(level,) for level in levels[1:]]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=deepstack)


def _product(size: int | Sequence[int], sides: int = 1) -> int:
    """Numbers in a patch: of a size for each of its ``sides``, or one for all."""
    return int(np.prod(size if isinstance(size, list | tuple) else [size] * sides))


def _is_row(part: Any) -> bool:
    """Whether ``part`` is a list of numbers, and not all patches of a picture or video."""
    return isinstance(part, list | tuple) and all(isinstance(number, float | int) for number in part[:1])


def _runs(is_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths, int64 each, of the runs of True in ``is_in`` [L]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_in.astype(np.int8), [0]])))
    return edges[::2], edges[1::2] - edges[::2]

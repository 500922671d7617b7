"""Small models and rows for tests of the parallel layer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from megatron_vila.config.schema import Config, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, FrameRef

VOCAB = 83
SIDE = 8


def model_config(heads: int = 8, kv_heads: int = 2, layers: int = 8, tied: bool = False, bias: bool = True) -> ModelConfig:
    """A float64-sized VILA: 2x2 patches per frame become one token after the 2x2 projector, or 4 with ``linear``."""
    return ModelConfig(
        name="test",
        vision=VisionConfig(
            hidden_size=8, num_layers=2, num_heads=2, ffn_hidden_size=12, image_size=SIDE, patch_size=4, use_head=False,
            frame_micro_batch=2,
        ),  # fmt: skip
        projector=ProjectorConfig(type="linear"),
        llm=LanguageConfig(
            num_layers=layers, hidden_size=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, ffn_hidden_size=16,
            vocab_size=VOCAB, qkv_bias=bias, tie_embeddings=tied, rope_theta=100.0, rope_scaling_factor=2.0, max_positions=256,
        ),  # fmt: skip
        init_std=0.3,
        attention="reference",
    )


def config(**kwargs) -> Config:
    return Config(model=model_config(**kwargs))


UNITS = {"F": Unit(1, 1, 4, 4), "T": Unit(1, 3, 12, 12), "V": Unit(2, 1, 8, 8), "P": Unit(4, 2, 3, 32)}
"""A frame; a frame in three tiles; two frames together, whose squares' tokens are those of ``model_config``'s tower. And frames
in tiles that are pooled to few tokens, which that tower does not make."""


@dataclass(frozen=True)
class Pooled:
    """``together`` frames of a video, ``tiles`` squares each, become ``tokens`` tokens, the last few frames as many; an image is
    one square of one token."""

    together: int
    tiles: int
    tokens: int
    needs_size: ClassVar[bool] = False

    def units(self, frames, is_video, size=None):
        if not is_video:
            return (Unit(1, 1, 1, 16),) * frames
        taken = [min(self.together, frames - first) for first in range(0, frames, self.together)]
        return tuple(Unit(count, self.tiles, self.tokens, 16 * count * self.tiles) for count in taken)


@dataclass(frozen=True)
class Tiled:
    """Each frame is cut into tiles of ``side`` pixels a side, at most ``most`` of them, and has three tokens a tile."""

    side: int
    most: int
    needs_size: ClassVar[bool] = True

    def units(self, frames, is_video, size=None):
        tiles = self.most
        if size is not None:
            width, height = (-(-pixels // self.side) for pixels in size)
            tiles = min(self.most, width * height)
        return (Unit(1, tiles, 3 * tiles, 16 * tiles),) * frames


def document(name: str, layout: str, supervised: slice | None = None) -> Document:
    """A document from a string: ``t`` a text token, the letters of ``UNITS`` a unit. ``supervised`` picks the tokens that are
    predicted."""
    rng = np.random.default_rng(list(name.encode()))
    ids, starts, frames = [], [], []
    for letter in layout:
        if letter in UNITS:
            unit, first = UNITS[letter], sum(len(frame.indices) for frame in frames)
            starts.append(len(ids))
            frames.append(FrameRef(f"{name}-{len(frames)}", tuple(range(first, first + unit.frames)), True, unit))
            ids += [MEDIA_TOKEN] * unit.tokens
        else:
            ids.append(int(rng.integers(VOCAB)))
    token_ids = np.array(ids, dtype=np.int64)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    following = np.append(token_ids[1:], IGNORE)
    if supervised is None:
        supervised = slice(None)
    labels[supervised] = following[supervised]
    labels[labels == MEDIA_TOKEN] = IGNORE
    return Document(token_ids, labels, tuple(frames), np.array(starts, dtype=np.int64), name)


def pixels(frames) -> torch.Tensor:
    """Stand-in pixels that are a function of the unit alone, float64 [F, 3, SIDE, SIDE], its squares one after the other."""
    images = []
    for frame in frames:
        seed = int.from_bytes(hashlib.sha256(f"{frame.source}:{frame.indices[0]}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        images += [torch.randn(3, SIDE, SIDE, dtype=torch.float64, generator=generator) for _ in range(frame.unit.squares)]
    return torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.float64)

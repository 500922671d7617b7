"""Small models and rows for tests of the parallel layer."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from megatron_vila.config.schema import Config, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
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


TOKENS_PER_FRAME = 4


def document(name: str, layout: str, supervised: slice | None = None) -> Document:
    """A document from a string: ``t`` a text token, ``F`` a frame. ``supervised`` picks the tokens that are predicted."""
    rng = np.random.default_rng(list(name.encode()))
    ids, starts, frames = [], [], []
    for letter in layout:
        if letter == "F":
            starts.append(len(ids))
            frames.append(FrameRef(f"{name}-{len(frames)}", len(frames), TOKENS_PER_FRAME, 4, True))
            ids += [MEDIA_TOKEN] * TOKENS_PER_FRAME
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
    """Stand-in pixels that are a function of the frame alone, float64 [F, 3, SIDE, SIDE]."""
    images = []
    for frame in frames:
        seed = int.from_bytes(hashlib.sha256(f"{frame.source}:{frame.index}".encode()).digest()[:8], "little") >> 1
        images.append(torch.randn(3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.float64)

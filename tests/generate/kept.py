"""A prefix with random keys and values, for tests that keep it on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from megatron_vila.generate.engine import Prefix
from megatron_vila.parallel.cache import Span, SpanShape
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, FrameRef

SHAPE = SpanShape(layers=3, kv_heads=2, head_dim=8)
MODEL = "model-a"


def content_of(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def document(folder: Path) -> Document:
    """Two frames of a video in one unit each, a unit of two pictures of a folder, and text between."""
    for name in ("hour.mp4", "a.png", "b.png"):
        if not (folder / name).exists():
            (folder / name).write_bytes(name.encode() * 100)
    video, pictures = str(folder / "hour.mp4"), (str(folder / "a.png"), str(folder / "b.png"))
    one, two = Unit(1, 1, 4, 16), Unit(2, 1, 6, 32)
    frames = (
        FrameRef(video, (3,), True, one),
        FrameRef(str(folder), (0, 1), True, two, pictures),
        FrameRef(video, (9,), True, one),
    )
    ids = np.array([5, 6, *[MEDIA_TOKEN] * 4, 7, *[MEDIA_TOKEN] * 6, 8, *[MEDIA_TOKEN] * 4], np.int64)
    return Document(ids, np.full(len(ids), IGNORE), frames, np.array([2, 7, 14], np.int64), "asked")


def prefix_of(folder: Path, dtype: torch.dtype, length: int = 700, rank: int = 0) -> Prefix:
    torch.manual_seed(rank)
    span = Span.empty(SHAPE, length + 5, dtype, torch.device("cpu"))
    for layer in range(SHAPE.layers):
        span.write(layer, torch.randn(length, 2, 8), torch.randn(length, 2, 8))
    span.commit(np.arange(length) * 2 + rank)
    read = document(folder)
    return Prefix(read, span, "key-of-it", len(read))


def stored_bytes(span: Span) -> list[bytes]:
    """All that is kept, bit for bit; what lies behind is not."""
    tensors = (x for x in (span.k, span.v, span.k_scale, span.v_scale) if x is not None)
    return [
        span.positions.tobytes(),
        *(x[:, : span.length].contiguous().view(torch.uint8).numpy().tobytes() for x in tensors),
    ]

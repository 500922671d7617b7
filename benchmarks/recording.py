"""A recording as cameras and the web give them, made up: full HD, H.264, 30 frames a second, a key frame every 250.

A large picture of soft shapes drifts, squares move over it, and grain lies on top: it has to be coded anew in each frame, as in a
real recording. The same call writes the same pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, RATE = 1920, 1080, 30
KEY_DISTANCE = 250
BITS_PER_S = 8_700_000
AT_ONCE = 64  # pictures, of 3 MB each


def write_recording(path: Path, seconds: int) -> Path:
    """``seconds`` of it as mp4, unless the file is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as out:
        options = {"preset": "veryfast", "g": str(KEY_DISTANCE), "keyint_min": str(KEY_DISTANCE), "sc_threshold": "0"}
        stream = out.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", BITS_PER_S
        for picture in _pictures(seconds * RATE):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode())
    temporary.rename(path)
    return path


def write_frames(path: Path, frames: int, side: int) -> Path:
    """``frames`` pictures of ``side`` pixels as preparation leaves them, all key frames, 2 a second, unless the file is there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.mp4")
    with av.open(str(temporary), "w") as out:
        stream = out.add_stream("libx264", rate=2, options={"preset": "veryfast", "g": "1", "crf": "23"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for picture in _pictures(frames, side, side):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode())
    temporary.rename(path)
    return path


def write_records(recording: Path, copies: int) -> Path:
    """A file of ``copies`` records, each of which asks about ``recording``; several are there for an epoch to have an order."""
    turns = [{"from": "human", "value": "<video>\nWhat is shown?"}, {"from": "gpt", "value": "Shapes that drift."}]
    records = [{"id": f"{number}", "video": recording.name, "conversations": turns} for number in range(copies)]
    path = recording.with_suffix(".json")
    path.write_text(json.dumps(records))
    return path


def _pictures(count: int, width: int = WIDTH, height: int = HEIGHT) -> Iterator[np.ndarray]:
    """Planes Y, U and V below each other: uint8 [height * 3 / 2, width]."""
    rng = np.random.default_rng(0)
    scenery = _soft(rng, height + 512, width + 1024)
    colors = _soft(rng, height // 2 + 256, width // 2 + 512)
    grain = rng.integers(-5, 6, (16, height, width)).astype(np.int16)
    square = min(160, height // 2)

    def picture(number: int) -> np.ndarray:
        x, y = (number * 3) % 1024, (number * 2) % 512
        luma = scenery[y : y + height, x : x + width] + grain[number % len(grain)]
        for place in range(12):
            left = (number * (5 + place) + 160 * place) % (width - square)
            top = (number * (3 + place) + 90 * place) % (height - square)
            luma[top : top + square, left : left + square] += 20 + 3 * place
        planes = np.empty((height * 3 // 2, width), dtype=np.uint8)
        planes[:height] = luma.clip(16, 235)
        chroma = colors[y // 2 : y // 2 + height // 2, x // 2 : x // 2 + width // 2]
        planes[height : height * 5 // 4] = chroma.reshape(-1, width)
        planes[height * 5 // 4 :] = (255 - chroma).reshape(-1, width)
        return planes

    with ThreadPoolExecutor() as pool:
        for first in range(0, count, AT_ONCE):
            yield from pool.map(picture, range(first, min(first + AT_ONCE, count)))


def _soft(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise at several scales, some of it fine: uint8 [height, width]."""
    total = np.zeros((height, width))
    for cell, weight in ((256, 60), (64, 30), (16, 15), (4, 10)):
        noise = rng.random((height // cell + 2, width // cell + 2))
        total += weight * np.kron(noise, np.ones((cell, cell)))[:height, :width]
    return (60 + total).clip(0, 255).astype(np.uint8)

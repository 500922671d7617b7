"""Synthetic long videos with questions: real mp4 files in which one moment holds the answer.

A video is a row of scenes in muted colors, with drifting waves and grain. At one random step of it a *needle* flashes: a shape
or a digit in a full color, at a random place and size. The question asks for its color, its shape or its digit, each with
eight equally frequent answers, so chance is 12.5 %, and nothing but the needle tells the answer. A step lasts ``hold`` frames of
the file; a trainer that takes as many frames, uniformly, as there are steps meets every step, and so the needle, once.

Legend: T frames of a clip, H = W side in pixels, n steps of a video.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from megatron_vila.errors import SettingError

COLORS = {
    "red": (225, 20, 20),
    "green": (10, 200, 20),
    "blue": (25, 50, 230),
    "yellow": (250, 230, 20),
    "cyan": (20, 225, 235),
    "magenta": (230, 30, 220),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SHAPES = ("disc", "square", "diamond", "ring", "cross", "bar", "triangle", "frame")
DIGITS = {
    "1": "upper-right lower-right",
    "2": "top upper-right middle lower-left bottom",
    "3": "top upper-right middle lower-right bottom",
    "4": "upper-left upper-right middle lower-right",
    "5": "top upper-left middle lower-right bottom",
    "6": "top upper-left middle lower-left lower-right bottom",
    "7": "top upper-right lower-right",
    "8": "top upper-left upper-right middle lower-left lower-right bottom",
}
"""Segments of each digit."""

ANSWERS = {"colour": tuple(COLORS), "shape": SHAPES, "digit": tuple(DIGITS)}
"""The eight answers to each kind of question. The questions keep ``colour``: another spelling gives other token ids."""

_QUESTIONS = (
    "Which {kind} flashed in the {medium}?",
    "What was the {kind} of the flash in the {medium}?",
    "Name the {kind} that flashed in the {medium}.",
)
_LONGEST_SCENE = 64
_OF_NEEDLES = 2**32 - 1  # where a set of videos has their number of steps: its random numbers are other ones


@dataclass(frozen=True)
class Needle:
    """What flashes: ``symbol`` is a shape or a digit; ``step`` counts from 0."""

    step: int
    color: str
    symbol: str


def write_synthetic_set(
    out_dir: str | Path,
    lengths: Sequence[int],
    train: int,
    evaluation: int,
    *,
    kinds: Sequence[str] = ("colour",),
    images: bool = False,
    size: int = 56,
    fps: int = 8,
    hold: int = 1,
    codec: str = "libx264",
    seed: int = 0,
    on_sample: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Write videos and LLaVA-format questions, and return the paths of the JSON files.

    For each length n (steps of a video) ``train`` samples go to ``train_{n}.json`` and ``evaluation`` samples to
    ``eval_{n}.json``; the files are in ``videos/``, their paths relative to the JSON file. With ``images`` the same is done
    with single pictures: ``train_image.json``, ``eval_image.json``, ``images/*.png``. Each sample has its own video, so the two
    splits share none. ``kinds`` are the kinds of questions, taken in turn. ``size`` is the side in pixels, ``fps`` frames per
    second of the file, ``hold`` frames per step. Each record also says in which frame of the file the needle begins
    (``needle_frame``). The same arguments give the same files. ``on_sample`` is called after each sample.

    Raises ``SettingError`` for arguments that cannot be drawn.
    """
    unknown = [k for k in kinds if k not in ANSWERS]
    if unknown or not kinds:
        raise SettingError(f"kinds={list(kinds)} must be some of {', '.join(ANSWERS)}")
    if size < 16 or size % 2:
        raise SettingError(f"size={size} cannot be encoded; use an even number of at least 16 pixels")
    if min([*lengths, fps, hold]) < 1 or min(train, evaluation) < 0:
        raise SettingError(
            f"lengths={list(lengths)}, fps={fps} and hold={hold} must be at least 1, "
            f"train={train} and evaluation={evaluation} at least 0"
        )
    out = Path(out_dir)
    written = []
    for steps in ([0] if images else []) + list(lengths):
        for split, count in (("train", train), ("eval", evaluation)):
            if not count:
                continue
            (out / ("videos" if steps else "images")).mkdir(parents=True, exist_ok=True)
            write = partial(
                _write_sample, out, split, steps, size=size, fps=fps, hold=hold, codec=codec, seed=seed
            )
            plan, records = _plan(count, kinds, np.random.default_rng([seed, steps, split == "eval"])), []
            # The encoder and numpy leave the interpreter to other threads meanwhile.
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
                for record in threads.map(write, range(count), *zip(*plan, strict=True)):
                    records.append(record)
                    on_sample()
            written.append(out / f"{split}_{steps or 'image'}.json")
            written[-1].write_text(json.dumps(records, indent=1) + "\n")
    return written


def write_needle_set(
    out_dir: str | Path, frames: int, needles: int, *, kind: str = "colour", size: int = 56, seed: int = 0
) -> tuple[Path, Path]:
    """Write what a needle test asks (``evaluation/needle.py``), of the same world, and return the two paths.

    ``haystack.mp4`` is a video of ``frames`` frames, one a second, in which nothing flashes. ``needles.json`` has the pictures
    (``needles/*.png``) with question and answer. The same arguments give the same files, with other random numbers than those of
    ``write_synthetic_set``.

    Raises ``SettingError`` for arguments that cannot be drawn.
    """
    if kind not in ANSWERS:
        raise SettingError(f"kind={kind} must be one of {', '.join(ANSWERS)}")
    if size < 16 or size % 2 or frames < 1 or needles < 1:
        raise SettingError(f"frames={frames} and needles={needles} must be at least 1, size={size} an even number of at least 16")
    out = Path(out_dir)
    (out / "needles").mkdir(parents=True, exist_ok=True)
    write_video(out / "haystack.mp4", render(frames, size, None, 1, np.random.default_rng([seed, _OF_NEEDLES, 0])), size, fps=1)
    records, answers = [], ANSWERS[kind]
    for index in range(needles):
        rng, path = np.random.default_rng([seed, _OF_NEEDLES, 1, index]), f"needles/{index:05d}.png"
        needle = _draw_needle(kind, answers[index % len(answers)], 1, rng)
        Image.fromarray(next(render(1, size, needle, 1, rng))[0]).save(out / path)
        question = str(rng.choice(_QUESTIONS)).format(kind=kind, medium="video")
        records.append({"image": path, "question": question, "answer": answers[index % len(answers)]})
    (out / "needles.json").write_text(json.dumps(records, indent=1) + "\n")
    return out / "haystack.mp4", out / "needles.json"


def corpus() -> list[str]:
    """Sentences with every word of the questions and answers, to train a tokenizer on."""
    texts = []
    for kind, answers in ANSWERS.items():
        for medium in ("image", "video"):
            texts += [f"<{medium}>\n{question.format(kind=kind, medium=medium)}" for question in _QUESTIONS]
            texts += [f"The {medium} shows a {kind}. The {kind} that flashed was {answer}." for answer in answers]
        texts += [f"It was not {a}, it was {b}.\n{a}\n{b}" for a in answers for b in answers if a != b]
    return texts + [
        "The user asks what, which or name.\nThe assistant answers.\nThe system says nothing.\nuser\nassistant\nsystem"
    ]


def render(steps: int, size: int, needle: Needle | None, hold: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw a video of ``steps * hold`` pictures, scene by scene: uint8 [T, H, W, 3]. Without a ``needle`` nothing flashes."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    u_HW, v_HW = np.meshgrid(axis, axis)
    grain = rng.normal(0, 4, (2 * size, 2 * size, 1)).astype(np.float32)
    half = rng.uniform(0.4, 0.7)
    center_u, center_v = rng.uniform(half - 0.95, 0.95 - half, 2)
    if needle is not None:
        mask_HW = symbol_mask(needle.symbol, (u_HW - center_u) / half, (v_HW - center_v) / half)
    done = 0
    while done < steps * hold:
        count = min(int(rng.integers(_LONGEST_SCENE // 8, _LONGEST_SCENE)), steps * hold - done)
        clip_THWC = _scene(count, u_HW, v_HW, grain, rng)
        if needle is not None:
            first, last = max(needle.step * hold - done, 0), max((needle.step + 1) * hold - done, 0)
            clip_THWC[first:last, mask_HW] = COLORS[needle.color]
        yield clip_THWC
        done += count


def symbol_mask(symbol: str, u_HW: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """Where a shape or digit covers the plane: bool [H, W]; u (right) and v (down) run from -1 to 1 across its box."""
    across, along, radius = np.abs(u_HW), np.abs(v_HW), np.hypot(u_HW, v_HW)
    box = np.maximum(across, along)
    if symbol in DIGITS:
        width, pen = 0.6, 0.3
        left, right = u_HW <= pen - width, u_HW >= width - pen
        upper, lower = v_HW <= pen / 2, v_HW >= -pen / 2
        segments = {
            "top": v_HW <= pen - 1,
            "middle": along <= pen / 2,
            "bottom": v_HW >= 1 - pen,
            "upper-left": upper & left,
            "upper-right": upper & right,
            "lower-left": lower & left,
            "lower-right": lower & right,
        }
        return np.any([segments[name] for name in DIGITS[symbol].split()], axis=0) & (across <= width) & (along <= 1)
    shapes = {
        "disc": radius <= 1,
        "square": box <= 0.85,
        "diamond": across + along <= 1,
        "ring": (radius <= 1) & (radius >= 0.55),
        "cross": np.minimum(across, along) <= 0.3,
        "bar": along <= 0.35,
        "triangle": across <= (v_HW + 1) / 2,
        "frame": box >= 0.55,
    }
    return shapes[symbol] & (box <= 1)


def write_video(path: str | Path, clips: Iterator[np.ndarray], size: int, fps: int, codec: str = "libx264") -> None:
    """Encode clips uint8 [T, H, W, 3] as an mp4 file with ``libx264`` or ``mpeg4``."""
    # Otherwise files depend on the processor, and with AVX-512 those of small pictures differ from call to call.
    ours = {"preset": "veryfast", "crf": "20", "x264-params": "cpu-independent=1"}
    quality = ours if codec == "libx264" else {"qmin": "3", "qmax": "3"}
    with av.open(str(path), "w") as container:
        # One thread: with more, the bytes of the file depend on the number of cores.
        stream: Any = container.add_stream(codec, rate=fps, options={**quality, "threads": "1"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for clip in clips:
            for picture in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_sample(
    out: Path,
    split: str,
    steps: int,
    index: int,
    kind: str,
    answer: str,
    *,
    size: int,
    fps: int,
    hold: int,
    codec: str,
    seed: int,
) -> dict:
    """Write the picture (``steps`` = 0) or video of one sample; returns its record. What is random follows from the arguments."""
    rng = np.random.default_rng([seed, steps, split == "eval", index])
    needle = _draw_needle(kind, answer, max(steps, 1), rng)
    frames = render(max(steps, 1), size, needle, hold if steps else 1, rng)
    path = f"videos/{split}_{steps}_{index:05d}.mp4" if steps else f"images/{split}_{index:05d}.png"
    if steps:
        write_video(out / path, frames, size, fps, codec)
    else:
        Image.fromarray(next(frames)[0]).save(out / path)
    return _record(path, kind, answer, needle.step * hold if steps else None, rng)


def _plan(count: int, kinds: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Kind and answer of each sample in random order, all answers equally frequent (as far as ``count`` allows)."""
    pairs = [
        (kind, answer)
        for answers in zip(*(ANSWERS[k] for k in kinds), strict=True)
        for kind, answer in zip(kinds, answers, strict=True)
    ]
    return [pairs[i % len(pairs)] for i in rng.permutation(count)]


def _draw_needle(kind: str, answer: str, steps: int, rng: np.random.Generator) -> Needle:
    symbols = tuple(DIGITS) if kind == "digit" else SHAPES
    color, symbol = str(rng.choice(list(COLORS))), str(rng.choice(symbols))
    return Needle(
        int(rng.integers(steps)), answer if kind == "colour" else color, symbol if kind == "colour" else answer
    )


def _record(path: str, kind: str, answer: str, needle_frame: int | None, rng: np.random.Generator) -> dict:
    medium = "image" if needle_frame is None else "video"
    question = str(rng.choice(_QUESTIONS)).format(kind=kind, medium=medium)
    return {
        "id": Path(path).stem,
        medium: path,
        "conversations": [{"from": "human", "value": f"<{medium}>\n{question}"}, {"from": "gpt", "value": answer}],
        "needle_frame": needle_frame or 0,
    }


def _scene(count: int, u_HW: np.ndarray, v_HW: np.ndarray, grain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One scene of ``count`` pictures: two muted colors mixed by a drifting wave, with grain that moves."""
    size = len(u_HW)
    base = (rng.uniform(90, 165) + rng.uniform(-20, 20, 3)).astype(np.float32)
    mix = (rng.uniform(-22, 22) + rng.uniform(-12, 12, 3)).astype(np.float32)
    wave_u, wave_v = rng.uniform(-4, 4, 2).astype(np.float32)
    angle_HW = wave_u * u_HW + wave_v * v_HW
    phase_T = (rng.uniform(0, 2 * np.pi) + rng.uniform(0.1, 0.5) * np.arange(count)).astype(np.float32)
    clip_THWC = np.empty((count, size, size, 3), dtype=np.uint8)
    for t, (down, right) in enumerate(rng.integers(0, size, (count, 2))):
        picture_HWC = np.sin(angle_HW + phase_T[t])[..., None] * mix + base
        picture_HWC += grain[down : down + size, right : right + size]
        clip_THWC[t] = picture_HWC.clip(0, 255)
    return clip_THWC

"""What the model sees of a record: ids, labels and pixels, by hand from the text and the files.

The rules are those of docs/data.md, written out for ChatML and for a tokenizer with one token for each byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

START, END, FIRST_BYTE = 1, 2, 3
VISUAL, NOT_LEARNED = -1, -100
TOKENS_OF_A_FRAME = 4
MEAN_COLOR = (127, 127, 127)

Media = Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class Pictures:
    """How samples are shown: settings of the run."""

    num_frames: int = 5
    fps: float = 0.0
    rule: str = "spread"
    aspect: str = "resize"
    frame_separator: tuple[int, ...] = (FIRST_BYTE + 10, FIRST_BYTE + 45)
    image_separator: tuple[int, ...] = (FIRST_BYTE + 42,)
    hermes: bool = False
    """VILA's prompt hermes-2: ChatML with a system text and without line breaks between turns"""
    side: int = 30


@dataclass(frozen=True)
class Sample:
    """``ids`` hold -1 at the places of visual tokens; ``labels`` say what follows, where that is learned. Pixels [F, 3, S, S]."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    pixels: torch.Tensor

    @property
    def learned(self) -> int:
        return sum(label != NOT_LEARNED for label in self.labels)


@dataclass(frozen=True)
class Outline:
    """A sample before its files are decoded: what is shown of each of them."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    media: Media
    chosen: tuple[tuple[int, ...], ...]
    truncated: bool = False


def bytes_of(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def outline(record: dict[str, Any], folder: Path, pictures: Pictures, longest: int) -> Outline | None:
    """The sample without its pixels, from text and headers; None if text and pictures do not fit ``longest`` tokens.

    A record that is too long by its video alone loses frames, evenly. Raises PyAV's errors for a file that cannot be opened.
    """
    media = [(key, folder / record[key]) for key in ("image", "video") if key in record]
    chosen = [_chosen(path, pictures) if kind == "video" else [0] for kind, path in media]
    made = _written(record, media, chosen, pictures)
    if len(made.ids) <= longest:
        return made
    videos = [place for place, (kind, _) in enumerate(media) if kind == "video"]
    if len(videos) != 1:
        return None
    all_of_it = chosen[videos[0]]
    a_frame = TOKENS_OF_A_FRAME + len(pictures.frame_separator)
    count = len(all_of_it) - -(-(len(made.ids) - longest) // a_frame)
    if count < 1:
        return None
    first, last = all_of_it[0], all_of_it[-1]
    chosen[videos[0]] = [round(first + k * (last - first) / max(count - 1, 1)) for k in range(count)]
    return replace(_written(record, media, chosen, pictures), truncated=True)


def sample_of(made: Outline, pictures: Pictures) -> Sample:
    """With its pixels. Raises what Pillow or PyAV raise for a broken file."""
    pixels = []
    for (kind, path), indices in zip(made.media, made.chosen, strict=True):
        shown = _decoded(path) if kind == "video" else [_still(path)]
        pixels += [_pixels(shown[index], pictures) for index in indices]
    empty = torch.zeros(0, 3, pictures.side, pictures.side, dtype=torch.float64)
    return Sample(made.ids, made.labels, torch.stack(pixels) if pixels else empty)


def _written(record: dict[str, Any], media: Media, chosen: list[list[int]], pictures: Pictures) -> Outline:
    """ChatML with all media, pictures first, before the first human turn, as VILA places them: markers leave with their line
    break, turns lose white space at both ends. An answer is learned together with its end token."""
    ids: list[int] = []
    learned: list[bool] = []

    def write(tokens: Sequence[int], learn: bool = False) -> None:
        ids.extend(tokens)
        learned.extend([learn] * len(tokens))

    if pictures.hermes:
        write([START, *bytes_of("system\nAnswer the questions."), END])
    for turn in record["conversations"]:
        role = {"system": "system", "human": "user", "gpt": "assistant"}[turn["from"]]
        write([START, *bytes_of(f"{role}\n")])
        text = turn["value"].strip()
        if role == "user" and VISUAL not in ids:
            for (kind, _), indices in zip(media, chosen, strict=True):
                end = pictures.frame_separator if kind == "video" else pictures.image_separator
                write([*[VISUAL] * TOKENS_OF_A_FRAME, *end] * len(indices))
        if role == "user" and media:
            for marker in ("<image>", "<video>"):
                text = text.replace(f"{marker}\n", "").replace(f"\n{marker}", "").replace(marker, "")
            text = text.strip()
        write([*bytes_of(text), END], learn=role == "assistant")
        write(bytes_of("" if pictures.hermes else "\n"))
    labels = [following if learn else NOT_LEARNED for following, learn in zip(ids[1:], learned[1:], strict=True)]
    return Outline(tuple(ids), (*labels, NOT_LEARNED), tuple(media), tuple(map(tuple, chosen)))


def _decoded(path: Path) -> list[Image.Image]:
    """All pictures of a video in the order in which they are shown."""
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def _chosen(path: Path, pictures: Pictures) -> list[int]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        total, rate = stream.frames, float(stream.average_rate)
    count = min(pictures.num_frames, total)
    if pictures.fps and pictures.rule == "first":
        # VILA's main branch: one after the other from the start.
        return [index for k in range(count) if (index := int(k / pictures.fps * rate)) < total]
    if pictures.fps:
        # LongVILA: as many as the rate allows, at least two, over the whole video, cut down to whole places.
        count = min(count, max(2, int(total / rate * pictures.fps)))
        return [int(k * (total - 1) / (count - 1)) for k in range(count)]
    return [round(k * (total - 1) / (count - 1)) for k in range(count)]


def _still(path: Path) -> Image.Image:
    with Image.open(path) as file:
        file.load()
        turned = file.transpose(Image.Transpose.ROTATE_270) if file.getexif().get(0x0112) == 6 else file
        return turned.convert("RGB")


def _pixels(picture: Image.Image, pictures: Pictures) -> torch.Tensor:
    """[3, side, side] from -1 to 1; with ``pad`` on a square of the mean color."""
    if pictures.aspect == "pad":
        width, height = picture.size
        square = Image.new("RGB", (max(width, height),) * 2, MEAN_COLOR)
        square.paste(picture, ((square.width - width) // 2, (square.height - height) // 2))
        picture = square
    small = np.asarray(picture.resize((pictures.side, pictures.side), Image.Resampling.BICUBIC))
    # In float32, as SigLIP's own processor: elsewhere everything is float64.
    return torch.from_numpy(small.astype(np.float32) * np.float32(2 / 255) - 1).permute(2, 0, 1).double()

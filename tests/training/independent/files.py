"""The files that both sides read: a tokenizer, videos, pictures and records, made without the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """One token for each byte, from id 3 on; 0, 1 and 2 are padding, start and end of a turn."""
    vocabulary = {"<|pad|>": 0, "<|im_start|>": 1, "<|im_end|>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<|pad|>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in list(vocabulary)[:3]])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def write_media(folder: Path) -> Path:
    """Two videos and two pictures, none of them square, no two colors alike."""
    for name, count, rate, seed in (("long.mp4", 12, 6, 1), ("short.mp4", 9, 4, 2)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "g": "5", "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 52, 36, "yuv420p"
            for index in range(count):
                picture = _picture(52, 36, seed, index / count)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    Image.fromarray(_picture(47, 25, 3, 0.2)).save(folder / "wide.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_picture(44, 31, 4, 0.7)).save(folder / "turned.jpg", quality=95, exif=exif)
    (folder / "cut.mp4").write_bytes((folder / "long.mp4").read_bytes()[:700])
    # Its table of frames is whole, its frames are not.
    wreck = bytearray((folder / "short.mp4").read_bytes())
    with av.open(str(folder / "short.mp4")) as container:
        for packet in container.demux(video=0):
            if packet.size:
                wreck[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    (folder / "wreck.mp4").write_bytes(wreck)
    return folder


def _picture(width: int, height: int, seed: int, time: float) -> np.ndarray:
    """Waves that run through the channels in different ways."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    y, x = np.mgrid[0:height, 0:width]
    angle = np.stack([x / 5 + time * 4, y / 4 - time * 7, (x + y) / 6 + time * 9], -1) + phase
    bright = np.array([0.9, 0.5, 0.25])
    return np.uint8(255 * bright * (0.5 + 0.5 * np.sin(angle)))


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    """A file with a list, or with a record a line, by its name."""
    text = json.dumps(records, ensure_ascii=False, indent=1)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def record(name: str, *turns: str, **media: str) -> dict[str, Any]:
    """``turns`` are those of the human and of the model by turns."""
    who = ("human", "gpt")
    conversations = [{"from": who[place % 2], "value": text} for place, text in enumerate(turns)]
    return {"id": name, **media, "conversations": conversations}

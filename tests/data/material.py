"""Real files for the data tests: mp4 videos whose frames carry their number, and tokenizers trained on the spot."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import av
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_vila.data.tokenizer import train_tokenizer

SIZE = 64
BITS = 16

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)
TEXTS = [
    "What is shown in the video?\nA red circle, then a blue square.\n\nName the colour: red, green, blue or yellow.",
    "Describe each step.\n1. The dog runs.\n2. The dog sleeps.\n\nsystem user assistant You are a helpful assistant",
    "Où est le chat ? Il dort. 猫はどこですか。 Sure! 0123456789 is a number; it's 42.",
]


def byte_level_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer built as those of Llama-3 (which adds a BOS by itself) and Qwen2 are."""
    llama = kind == "llama3"
    tokenizer = Tokenizer(models.BPE(ignore_merges=llama))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT if llama else QWEN2_SPLIT), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        if llama
        else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    byte_level = processors.ByteLevel(trim_offsets=False)
    if llama:
        begin = tokenizer.token_to_id("<|begin_of_text|>")
        add_begin = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
            special_tokens=[("<|begin_of_text|>", begin)],
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_begin])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            chat_template=LLAMA3_TEMPLATE,
        )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = byte_level
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN2_TEMPLATE
    )


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with SentencePiece's white space marks and byte fallback, with a Vicuna-like template."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=VICUNA_TEMPLATE
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """The project's own tokenizer, trained on a few lines so that other characters become bytes."""
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(TEXTS[:2], folder, vocab_size=340)


def write_video(path: Path, frames: int, fps: int = 8, gop: int = 4) -> Path:
    """An H.264 mp4 whose frame i carries i as white and black blocks; a key frame every ``gop`` frames."""
    options = {
        "preset": "ultrafast",
        "crf": "18",
        "threads": "1",
        "g": str(gop),
        "keyint_min": str(gop),
        "sc_threshold": "0",
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(stamp(index), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def stamp(index: int) -> np.ndarray:
    side = SIZE // 4
    bits = np.array([index >> bit & 1 for bit in range(BITS)], dtype=np.uint8).reshape(4, 4) * 255
    return np.repeat(np.repeat(np.repeat(bits[..., None], 3, axis=2), side, axis=0), side, axis=1)


def read_stamps(pixels_F3HW) -> list[int]:
    """The frame numbers that preprocessed pixels (bytes, or scaled to -1..1) of stamped videos show."""
    numbers = []
    pixels_F3HW = np.asarray(pixels_F3HW)
    middle = 127.5 if pixels_F3HW.dtype == np.uint8 else 0
    for picture in pixels_F3HW.mean(axis=1):
        side = picture.shape[0] // 4
        bits = picture.reshape(4, side, 4, side).mean(axis=(1, 3)).reshape(-1) > middle
        numbers.append(int(sum(1 << bit for bit in range(BITS) if bits[bit])))
    return numbers


def destroy_frames(path: Path, first: int, last: int) -> Path:
    """Overwrite the packets of frames ``first`` to ``last`` of an mp4; its header and its other frames stay as they are."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size)
    with path.open("r+b") as stream:
        for _, offset, size in packets[first : last + 1]:
            stream.seek(offset)
            stream.write(b"\xff" * size)
    return path


def cut_off(path: Path) -> Path:
    """Keep the first half of the bytes of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def conversation(question: str = "What is shown?", answer: str = "A red circle.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)

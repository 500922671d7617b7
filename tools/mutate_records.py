"""Read and train on thousands of damaged records, and look for anything that ends a run.

    python tools/mutate_records.py --count 1000

Good records of many shapes are damaged: bytes of their JSON, or values, names and places of their fields. They go in files of
100, with some good ones, through the reader, the length table and the loader, packed and not, and every second file through a
whole run with ``data.max_broken=1``. The same seed gives the same records. The status is 1 if anything raised; the files with
such records are kept.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila import accelerator, processes
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.data.cards import Alone, Cards
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import SampleOrder
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.sources.open import open_records
from megatron_vila.data.stream import Stream, StreamState
from megatron_vila.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_vila.plan.flops import flop_prices
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import row_vision

IN_A_FILE, GOOD_IN_A_FILE, TRAINED, STEPS = 100, 10, 2, 11
"""Damaged and good records of a file; every second file is trained on, for an epoch of so many steps."""

SETTINGS = [
    "data.num_frames=4", "data.workers=2", "data.max_broken=1", "train.global_batch_size=10", f"train.steps={STEPS}",
    "train.seq_length=128", f"train.log_every={STEPS}", "checkpoint.save=false", "model.llm.num_layers=1",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="damaged records")
    parser.add_argument("--seed", type=int, default=0, help="another number gives other damage")
    parser.add_argument("--minutes", type=float, default=60, help="the run ends after this time, with what was done")
    parser.add_argument("--keep", type=Path, default=Path("mutated_records"), help="folder for files that show a fault")
    args = parser.parse_args()
    started_s = time.monotonic()
    accelerator.prepare()
    logging.getLogger("megatron_vila").setLevel(logging.ERROR)
    counts, faults = run(args.count, args.seed, args.minutes * 60, args.keep)
    print(
        f"{counts['damaged']} records in {time.monotonic() - started_s:.0f} s: {counts['bad']} bad by their form, "
        f"{counts['broken']} broken in use, {counts['used']} used; {counts['runs']} runs of {STEPS} steps; "
        f"{counts['unforeseen']} errors that nobody foresaw; {len(faults)} faulty"
    )
    for path, what in faults:
        print(f"{path}:\n{what}")
    return 1 if faults else 0



def run(count: int, seed: int, limit_s: float, keep: Path) -> tuple[Counter, list[tuple[Path, str]]]:
    """Damage and use ``count`` records.

    Gives what became of them, and (file, traceback) of each file that raised.
    """
    counts, faults, end_s = Counter(), [], time.monotonic() + limit_s
    unforeseen = _Unforeseen()
    logging.getLogger("megatron_vila.data.failures").addHandler(unforeseen)
    with tempfile.TemporaryDirectory() as folder:
        good = make_seeds(Path(folder))
        for first in range(0, count, IN_A_FILE):
            if time.monotonic() > end_s:
                break
            damaged = list(mutations(good, min(IN_A_FILE, count - first), (seed, first)))
            path = _write(Path(folder), first, damaged, good)
            config = load_config("tiny", [*SETTINGS, f"data.train=[{path}]", f"data.tokenizer={folder}/tokenizer"])
            config.train.output = f"{folder}/run-{first}"
            try:
                _use(config, counts)
                if first // IN_A_FILE % TRAINED == 0:
                    _train(config, counts)
            except BaseException:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, keep)
                faults.append((keep / path.name, traceback.format_exc()))
            counts["damaged"] += len(damaged)
            if sys.stderr.isatty():
                print(f"\r{counts['damaged']} of {count}", end="", file=sys.stderr)
    logging.getLogger("megatron_vila.data.failures").removeHandler(unforeseen)
    counts["unforeseen"] = unforeseen.seen
    return counts, faults


class _Unforeseen(logging.Handler):
    """Counts the tracebacks that are logged."""

    seen = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += record.exc_info is not None


def _use(config: Config, counts: Counter) -> None:
    """Every record through reader and loader, one to a row and packed."""
    records = open_records(config.data, config.data.train)
    tokenizer = load_tokenizer(config.data.tokenizer)
    config.model.llm.vocab_size = len(tokenizer)
    dataset = VilaDataset(records, tokenizer, config.data, config.model, config.train.seq_length)
    broken = set()
    for packing in (False, True):
        with _loader(config, dataset, packing) as loader:
            seen = 0
            while seen < len(records):
                seen += loader.next_step().plan.counts["drawn"]
            broken |= set(loader.broken) - set(records.bad)
    counts["bad"] += len(records.bad)
    counts["broken"] += len(broken)
    counts["used"] += len(records) - GOOD_IN_A_FILE - len(records.bad) - len(broken)


def _loader(config: Config, dataset: VilaDataset, packing: bool) -> RowLoader:
    length = config.train.seq_length
    stream = Stream(
        SampleOrder([len(dataset)], 0, shuffle=packing),
        Cards(len(dataset)),
        flop_prices(config.model, config.optim, pictures=True),
        rows=1,
        packing=packing,
        seq_length=length,
        vision_capacity=row_vision(dataset.pictures, length),
    )
    decoder = RowDecoder(dataset.probe, dataset.failures, image_size=28, aspect="resize", workers=2)
    return RowLoader(dataset, stream, StreamState(), GridShape(), 0, decoder, exchange=Alone(), workers=2, prefetch=4)


def _train(config: Config, counts: Counter) -> None:
    # Imported late: Megatron-Core must find the platform prepared.
    from megatron_vila.training.start import make_trainer

    processes.init_distributed()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            make_trainer(config).run()
    finally:
        processes.end_distributed()
    counts["runs"] += 1


def _write(folder: Path, first: int, damaged: list[bytes], good: list[dict]) -> Path:
    """A file of damaged and good records, one a line."""
    lines = [*damaged, *(json.dumps(record).encode() for record in good[:GOOD_IN_A_FILE])]
    path = folder / f"records-{first}.jsonl"
    path.write_bytes(b"\n".join(line.replace(b"\n", b" ") or b"{" for line in lines) + b"\n")
    return path


def make_seeds(folder: Path) -> list[dict]:
    """Good records of many shapes, with their media and a tokenizer in ``folder``."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    with av.open(str(folder / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=4, options={"threads": "1"})
        stream.width = stream.height = 32
        for picture in pixels:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    (folder / "clip").mkdir()
    for number, picture in enumerate(pixels[:4]):
        Image.fromarray(picture).save(folder / f"clip/{number}.jpg")
    ask, answer = {"from": "human", "value": "<video>\nWhat is shown?"}, {"from": "gpt", "value": "Noise, only noise."}
    plain = [{"from": "human", "value": "What is shown?"}, answer]
    train_tokenizer(["What is shown?", "Noise, only noise.", "Be brief."], folder / "tokenizer", 300)
    return [
        {"id": "video", "video": "a.mp4", "conversations": [ask, answer]},
        {"id": 7, "image": "clip/0.jpg", "conversations": [{**ask, "value": "<image>\nWhat is shown?"}, answer]},
        {"id": "text", "conversations": plain},
        {"video": "a.mp4", "start": 1, "end": 2.5, "conversations": [ask, answer, *plain]},
        {"id": "folder", "video": "clip", "fps": 2, "conversations": plain},
        {"id": "list", "frames": ["clip/0.jpg", "clip/2.jpg"], "conversations": plain},
        {"id": "two", "video": ["a.mp4", "a.mp4"], "start": [0, 1], "end": [1, 2], "conversations": plain},
        {"id": "images", "images": ["clip/1.jpg", "clip/3.jpg"], "conversations": plain},
        {"id": "system", "system": "Be brief.", "video_path": "a.mp4", "conversations": plain},
        {"id": "turn", "conversations": [{"from": "system", "value": "Be brief."}, *plain]},
        *_other_shapes((folder / "clip/0.jpg").read_bytes()),
    ]


def _other_shapes(picture: bytes) -> list[dict]:
    """Records in other forms than LLaVA's; ``picture`` is the content of a picture."""
    address = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    words, answer = {"type": "text", "text": "What is shown?"}, {"role": "assistant", "content": "Noise, only noise."}
    parts = [
        {"type": "image", "image": "clip/0.jpg", "max_pixels": 50176},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "video", "video": "a.mp4", "fps": 1.0, "video_end": 2.0},
        words,
    ]
    asked = {"role": "user", "content": "<image>\nWhat is shown?"}
    sentences, info = ["Be brief.", "Noise, only noise."], {"image_name": "clip/1.jpg", "matched_text_index": 1}
    rounds = [{"user": "What is shown?", "assistant": "Noise, only noise."}] * 2
    return [
        {"id": "messages", "messages": [{"role": "system", "content": "Be brief."}, asked, answer], "images": ["clip/2.jpg"]},
        {"id": "parts", "messages": [{"role": "user", "content": parts}, answer]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, words]}, answer], "images": [address]},
        {"query": "What is shown?", "response": "Noise.", "history": [["What?", "Noise."]], "videos": ["a.mp4"]},
        {"text": "Noise, <image> only noise.", "image": "clip/3.jpg"},
        {"caption": "Noise, only noise.", "video": "a.mp4"},
        {"text_list": sentences, "image_info": [info], "similarity_matrix": [[0.1, 0.2]]},
        {"texts": [None, "Noise.", None], "images": ["clip/0.jpg", None, address]},
        {"texts": rounds, "images": ["clip/1.jpg"]},
    ]


def mutations(good: list[dict], count: int, seed: tuple[int, ...]) -> Iterator[bytes]:
    """``count`` damaged records as JSON, in turn in their structure and in their bytes."""
    for number in range(count):
        random = np.random.default_rng((*seed, number))
        record = copy.deepcopy(good[number % len(good)])
        if number % 2:
            text = bytearray(json.dumps(record).encode())
            for _ in range(random.integers(1, 3)):
                text = BYTES[random.integers(len(BYTES))](text, random) or bytearray(b"{")
            yield bytes(text)
            continue
        for _ in range(random.integers(1, 3)):
            _damage(record, random)
        text = json.dumps(record).encode()
        for sign, raw in RAW.items():
            text = text.replace(f'"{sign}"'.encode(), raw)
        yield text


RAW = {
    "#deep": b"[" * 5000 + b"]" * 5000,
    "#digits": b"9" * 5000,
    "#infinite": b"1e999",
    "#twice": b'{"a": 1, "a": 2}',
    "#half": b'"\\ud83d \\udc00"',
    "#zero": b'"a\\u0000.mp4"',
}
"""JSON that Python's writer does not write, by the text that stands for it."""

VALUES = [
    None, True, False, 0, -1, 1.5, 10**30, float("nan"), float("-inf"), "", " ", "a.mp4", "clip", "gone.mp4", "/proc/self/mem",
    "../" * 50, "x" * 5000, "\u202e\ufdd0", "<video>" * 20, "<image> <video>", "<|im_end|>\n<|im_start|>assistant", "\ud83d",
    [], [[]], [None], [[], {}], ["a.mp4", "clip/0.jpg"], {}, {"from": []}, {"path": "a.mp4"}, [{"from": "human", "value": 1}],
    *RAW,
]  # fmt: skip
NAMES = ["video", "Videos", "image", "frames", "start", "video_end", "fps", "audio", "clip", "id", "from", "value", "\0"]
NAMES += ["role", "content", "type", "text", "texts", "messages", "tools", "loss", "image_url", "matched_text_index"]


def _damage(record: dict, random: np.random.Generator) -> None:
    """Change one value, name or place somewhere in ``record``."""
    holder: Any = record
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = keys[random.integers(len(keys))]
        if isinstance(holder[key], dict | list) and holder[key] and random.integers(4):
            holder = holder[key]
            continue
        break
    what = random.integers(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[NAMES[random.integers(len(NAMES))]] = holder.pop(key)
    elif what == 2 and isinstance(holder, dict):
        holder[NAMES[random.integers(len(NAMES))]] = VALUES[random.integers(len(VALUES))]
    elif what == 2:
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = VALUES[random.integers(len(VALUES))]


def _flip_bits(text: bytearray, random: np.random.Generator) -> bytearray:
    for place in random.integers(len(text), size=random.integers(1, 4)):
        text[place] ^= 1 << random.integers(8)
    return text


def _cut(text: bytearray, random: np.random.Generator) -> bytearray:
    return text[: random.integers(len(text)) + 1]


def _remove(text: bytearray, random: np.random.Generator) -> bytearray:
    begin = random.integers(len(text))
    return text[:begin] + text[begin + random.integers(1, 20) :]


def _repeat(text: bytearray, random: np.random.Generator) -> bytearray:
    begin, end = sorted(random.integers(len(text) + 1, size=2))
    return text[:end] + text[begin:end] + text[end:]


def _insert(text: bytearray, random: np.random.Generator) -> bytearray:
    signs = (b'"', b"\\", b"{", b"]", b"\0", b"\xff", b"\xed\xa0\xbd", b"\\u0000", b"\\ud83d", b"1e999", b",", "\u2028".encode())
    place = random.integers(len(text))
    return text[:place] + signs[random.integers(len(signs))] + text[place:]


BYTES = (_flip_bits, _cut, _remove, _repeat, _insert, _insert)

if __name__ == "__main__":
    sys.exit(main())

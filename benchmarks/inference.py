"""Inference measured, as CSV: prefill, decoding and memory of the engine on one GPU, and of stock Transformers beside it.

Weights are random; no number depends on them. ``engine`` reads prompts of text, or of the frames of a video (``--frames``), and
decodes. ``stock`` does the same with Transformers' Qwen2, in one forward call or in chunks. ``longest`` finds the longest prompt
whose cache has room: it is allocated in full and filled, and the last two chunks and 16 decoded tokens are really run.
``stock_longest`` does so for Transformers: its last layer really runs, in the memory that the other layers leave.
``--snapshot`` saves a prompt's cache, takes it up again from the disk, and asks.

  python -m benchmarks.inference engine --tokens 131072,262144,524288 --out docs/benchmarks/inference.csv
  python -m benchmarks.inference stock --tokens 131072,262144,393216 --out docs/benchmarks/inference.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recording import write_frames
from benchmarks.stock_inference import WARM_UP, Done, free, now, rates, stock, stock_longest
from benchmarks.table import hardware, versions
from megatron_vila import accelerator, processes
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.plan.budgets import GIB

COLUMNS = (
    *(
        "engine",
        "model",
        "gpus",
        "tp",
        "ulysses",
        "ring",
        "tokens",
        "frames",
        "cache",
        "prefill_s",
        "prefill_tflops_per_gpu",
    ),
    *("decode_tokens_per_s", "peak_gib", "note", "hardware", "versions", "command"),
)
NEW_TOKENS = 64
"""Tokens that are decoded where it is timed, warm-up included."""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.inference", *arguments])
    accelerator.prepare()
    processes.init_distributed()
    config = load_config(options.config, options.overrides)
    lengths = [int(text) for text in options.tokens.split(",")]

    def done(row: dict[str, Any]) -> None:
        row = {"model": config.model.name, "gpus": 1, "tp": 1, "ulysses": 1, "ring": 1, "frames": 0, **row}
        row |= {"hardware": hardware(1), "versions": versions(), "command": command}
        print({name: value for name, value in row.items() if name not in ("versions", "command")}, flush=True)
        _write(options.out, row)

    KINDS[options.kind](config, lengths, options, done)
    processes.end_distributed()
    return 0


def engine(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    model = _model(config)
    pictures = _pictures_of(model, config, options)
    for cache in options.cache.split(","):
        made = _engine(model, config, cache, options)
        _warm_up(made, config)
        for tokens in lengths:
            document, source = _document(config, tokens, options, pictures)
            if options.frames:  # what the tower compiles for full chunks and for the last one
                per_chunk = made.chunk_tokens // document.frames[0].tokens
                few = _video(config, options, min(options.frames, per_chunk + options.frames % per_chunk))
                made.prefill(few, source, "warm-up")
            accelerator.reset_peak_memory()
            started_s = now()
            prefix = made.prefill(document, source, f"{tokens}", _progress(options))
            prefill_s = now() - started_s
            row = {
                "engine": "megatron_vila",
                "tokens": prefix.tokens,
                "frames": sum(frame.unit.frames for frame in document.frames),
                "cache": cache,
                "note": f"chunks of {made.chunk_tokens} tokens",
                **rates(config, prefix.tokens, prefill_s),
                "decode_tokens_per_s": _decoded(made, prefix),
                "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            }
            done(row)
            held = [prefix]
            del prefix
            if options.snapshot:
                done(row | _snapshot(made, held, options))
            held.clear()
            free()
        del made
        free()


def longest(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    from megatron_vila.generate.engine import Prefix
    from megatron_vila.generate.runner import Piece
    from megatron_vila.parallel.cache import Span

    model = _model(config)
    for cache in options.cache.split(","):
        made = _engine(model, config, cache, options)
        _warm_up(made, config)
        for tokens in lengths:
            free()
            accelerator.reset_peak_memory()
            span = None
            try:
                span = Span.empty(made.span_shape, tokens, made.cache_dtype, made.device)
                filled = tokens - 2 * made.chunk_tokens
                for first in range(0, filled, 2**16):
                    places = np.arange(first, min(first + 2**16, filled))
                    for layer in range(made.span_shape.layers):
                        kv = torch.randn(2, len(places), *span.k.shape[2:], device=made.device, dtype=made.dtype)
                        span.write(layer, *kv)
                    span.commit(places)
                started_s = now()
                for start in range(filled, tokens, made.chunk_tokens):
                    document = _text(config, made.chunk_tokens)
                    made.runner.read(made.runner.plan([Piece(document, start, (span,), span)]))
                seconds = now() - started_s
                rate = _decoded(made, Prefix(_text(config, 1), span, "", tokens), 16 + WARM_UP)
            except torch.OutOfMemoryError as error:
                print(
                    f"{tokens} tokens with a {cache} cache do not fit: {str(error).splitlines()[0][:200]}", flush=True
                )
                del span
                continue
            row = {
                "engine": "megatron_vila",
                "tokens": tokens,
                "cache": cache,
                "note": f"cache filled; last two chunks of {made.chunk_tokens} tokens in {seconds:.1f} s",
                "decode_tokens_per_s": rate,
                "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            }
            done(row)
            if options.snapshot:
                held = [Prefix(_text(config, 1), span, "", tokens)]
                span = None
                done(row | _snapshot(made, held, options))
            break
        del made, span
        free()


KINDS = {"engine": engine, "stock": stock, "longest": longest, "stock_longest": stock_longest}


def _model(config: Config):
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_vila.config.schema import ParallelConfig
    from megatron_vila.models.vila import VilaModel
    from megatron_vila.parallel.topology import ParallelTopology

    topology = ParallelTopology.create(ParallelConfig())
    model_parallel_cuda_manual_seed(1)
    return VilaModel(config, topology, accelerator.dtype_of("auto"), accelerator.device()).requires_grad_(False)


def _engine(model, config: Config, cache: str, options: argparse.Namespace):
    from megatron_vila.generate.engine import Engine

    return Engine(model, model.topology, config, cache_dtype=cache, chunk_tokens=options.chunk)


def _pictures_of(model, config: Config, options: argparse.Namespace):
    from megatron_vila.data.frame_chooser import FrameChooser
    from megatron_vila.generate.frames import FrameSource

    chooser = FrameChooser(config.data, config.model)
    return FrameSource(model.vision, model.projector, config, chooser, "random", options.kept_gib * GIB)


def _warm_up(made, config: Config) -> None:
    """Compile what prefill and decoding use."""
    prefix = made.prefill(_text(config, 3 * made.chunk_tokens), _NoPictures(config), "warm-up")
    _decoded(made, prefix, 2 * WARM_UP)


class _NoPictures:
    """The frames of a text."""

    def __init__(self, config: Config) -> None:
        size = 0, config.model.llm.hidden_size
        self._nothing = torch.empty(size, dtype=accelerator.dtype_of("auto"), device=accelerator.device())

    def start(self, row_number, plan) -> None: ...

    def tokens(self, row_number, plan) -> torch.Tensor:
        return self._nothing


def _text(config: Config, tokens: int):
    from megatron_vila.plan.row import IGNORE, Document

    ids = np.random.default_rng(tokens).integers(config.model.llm.vocab_size, size=tokens)
    return Document(ids, np.full(tokens, IGNORE), (), np.empty(0, np.int64), "text")


def _document(config: Config, tokens: int, options: argparse.Namespace, pictures):
    """Text of ``tokens``, or what ``--frames`` of a video become, and where its frames come from."""
    if not options.frames:
        return _text(config, tokens), _NoPictures(config)
    return _video(config, options, options.frames), pictures


def _video(config: Config, options: argparse.Namespace, frames: int):
    """The first ``frames`` of the video, and nothing else."""
    from megatron_vila.plan.pictures import pictures_of
    from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, references

    size = config.model.vision.image_size
    video = write_frames(options.folder / f"frames_{options.frames}.mp4", options.frames, size)
    shown = references(str(video), range(frames), True, pictures_of(config.model).units(frames, True))
    starts = np.concatenate([[0], np.cumsum([frame.tokens for frame in shown])]).astype(np.int64)
    ids = np.full(starts[-1], MEDIA_TOKEN)
    return Document(ids, np.full(len(ids), IGNORE), shown, starts[:-1], "video")


def _decoded(made, prefix, new: int = NEW_TOKENS) -> float:
    """Tokens a second, from the median time between two of them."""
    from megatron_vila.generate.engine import Request
    from megatron_vila.generate.sampling import Sampling

    times: list[float] = []
    request = Request(prefix, np.arange(1, 33))
    made.answer([request], Sampling(max_new_tokens=new), on_token=lambda row, token: times.append(time.perf_counter()))
    return round(1 / float(np.median(np.diff(times)[WARM_UP - 1 :])), 1)


def _snapshot(made, held: list, options: argparse.Namespace) -> dict[str, Any]:
    """Save the prefix that ``held`` alone holds, forget it, take it up from the disk, and have the first token of an answer."""
    from megatron_vila.generate import snapshot
    from megatron_vila.generate.engine import Request
    from megatron_vila.generate.sampling import Sampling

    prefix = held.pop()
    started_s, size = now(), prefix.span.nbytes
    snapshot.save(options.snapshot, prefix, made.topology, "random", str)
    saved_s = now() - started_s
    del prefix
    free()
    for file in options.snapshot.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    started_s = now()
    prefix = snapshot.load(options.snapshot, made.topology, "random", made.span_shape, made.cache_dtype, str)
    loaded_s = now() - started_s
    made.answer([Request(prefix, np.arange(1, 33))], Sampling(max_new_tokens=1))
    first_s = now() - started_s
    started_s = now()
    made.answer([Request(prefix, np.arange(2, 34))], Sampling(max_new_tokens=1))
    again_s = now() - started_s
    shutil.rmtree(options.snapshot)
    told = (
        f"snapshot of {size / GIB:.2f} GiB: saved in {saved_s:.1f} s, loaded in {loaded_s:.1f} s; first token of another "
        f"question {again_s:.2f} s"
    )
    return {"prefill_s": round(first_s, 2), "prefill_tflops_per_gpu": "", "decode_tokens_per_s": "", "note": told}


def _progress(options: argparse.Namespace):
    begun_s, told = time.perf_counter(), [0]

    def tell(tokens: int, frames: int, all_tokens: int) -> None:
        if tokens >= told[0]:
            told[0] = tokens + all_tokens // 8
            print(
                f"{tokens} of {all_tokens} tokens, {frames} frames, {time.perf_counter() - begun_s:.1f} s", flush=True
            )

    return tell


def _write(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to the table, in the place of an earlier one of the same case."""
    kept = list(csv.DictReader(path.open())) if path.exists() else []
    case = "engine", "model", "tokens", "frames", "cache", "note"
    key = lambda row: tuple(str(row.get(name, "")) for name in case)  # noqa: E731
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*(old for old in kept if key(old) != key(row)), row])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration")
    parser.add_argument("--config", default="models/longvila-7b", help="YAML file or preset of the model")
    parser.add_argument("--tokens", required=True, help="lengths of prompts; longest: those to try, until one fits")
    parser.add_argument("--frames", type=int, default=0, help="engine: frames of a video, in the place of text")
    parser.add_argument("--cache", default="bf16", help="of auto, bf16, fp8")
    parser.add_argument("--chunk", type=int, default=0, help="tokens read at once (stock: 0 for one forward call)")
    parser.add_argument("--kept-gib", type=int, default=0, help="host memory for embeddings of frames")
    parser.add_argument("--snapshot", type=Path, help="engine: save each prompt's cache there, and take it up again")
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark"), help="where the video is written")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, to which the rows are added")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

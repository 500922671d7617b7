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
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recording import write_frames
from benchmarks.table import hardware, versions
from megatron_vila import accelerator, processes
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.sizes import head_dim, linear_shapes

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
"""Tokens that are decoded where it is timed; the first eight compile, record the CUDA graph and warm up."""
WARM_UP = 8


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


Done = Callable[[dict[str, Any]], None]


def engine(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    model = _model(config)
    pictures = _pictures_of(model, config, options)
    for cache in options.cache.split(","):
        made = _engine(model, config, cache, options)
        _warm_up(made, config)
        for tokens in lengths:
            document, source = _document(config, tokens, options, pictures)
            accelerator.reset_peak_memory()
            started_s = _now()
            prefix = made.prefill(document, source, f"{tokens}", _progress(options))
            prefill_s = _now() - started_s
            row = {
                "engine": "megatron_vila",
                "tokens": prefix.tokens,
                "frames": sum(frame.unit.frames for frame in document.frames),
                "cache": cache,
                "note": f"chunks of {made.chunk_tokens} tokens",
                **_rates(config, prefix.tokens, prefill_s),
                "decode_tokens_per_s": _decoded(made, prefix),
                "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            }
            done(row)
            held = [prefix]
            del prefix
            if options.snapshot:
                done(row | _snapshot(made, held, options))
            held.clear()
            _free()
        del made
        _free()


def longest(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    from megatron_vila.generate.engine import Prefix
    from megatron_vila.generate.runner import Piece
    from megatron_vila.parallel.cache import Span

    model = _model(config)
    for cache in options.cache.split(","):
        made = _engine(model, config, cache, options)
        _warm_up(made, config)
        for tokens in lengths:
            _free()
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
                started_s = _now()
                for start in range(filled, tokens, made.chunk_tokens):
                    document = _text(config, made.chunk_tokens)
                    made.runner.read(made.runner.plan([Piece(document, start, (span,), span)]))
                seconds = _now() - started_s
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
        _free()


def stock(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    model = _stock_model(config, config.model.llm.num_layers)
    for tokens in lengths:
        step = options.chunk or tokens
        ids_1S = torch.randint(config.model.llm.vocab_size, (1, tokens), device=accelerator.device())
        try:
            with torch.no_grad():
                model(ids_1S[:, :1024], use_cache=True, logits_to_keep=1)
                accelerator.reset_peak_memory()
                started_s, cache = _now(), None
                for first in range(0, tokens, step):
                    out = model(
                        ids_1S[:, first : first + step], past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                    cache = out.past_key_values
                prefill_s = _now() - started_s
                times = []
                for _ in range(WARM_UP):
                    begun_s = _now()
                    token_11 = out.logits[:, -1:].argmax(-1)
                    out = model(token_11, past_key_values=cache, use_cache=True)
                    times.append(_now() - begun_s)
        except torch.OutOfMemoryError as error:
            print(f"{tokens} tokens do not fit: {str(error).splitlines()[0][:200]}", flush=True)
            cache = out = None
            _free()
            continue
        done(
            {
                "engine": "transformers",
                "tokens": tokens,
                "cache": "bf16",
                "note": f"chunks of {step} tokens" if options.chunk else "one forward call",
                **_rates(config, tokens, prefill_s),
                "decode_tokens_per_s": round(1 / statistics.median(times[2:]), 1),
                "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            }
        )
        del cache, out
        _free()


def stock_longest(config: Config, lengths: Sequence[int], options: argparse.Namespace, done: Done) -> None:
    """The first of ``lengths`` whose last layer runs, in one forward call or (``--chunk``) as the last chunk of a filled cache.

    Memory is held for the weights of the layers before and for their keys and values, which a whole run would hold by then.
    """
    from transformers import DynamicCache

    llm, device = config.model.llm, accelerator.device()
    model = _stock_model(config, 1)
    layer_bytes = 2 * sum(weight.numel() for weight in model.model.layers.parameters())
    token_bytes = 2 * 2 * llm.num_kv_heads * head_dim(llm)
    for tokens in lengths:
        step = options.chunk or tokens
        accelerator.reset_peak_memory()
        held = cache = out = kv = None
        try:
            others = (llm.num_layers - 1) * (layer_bytes + tokens * token_bytes)
            held = [torch.empty(others, dtype=torch.uint8, device=device)]
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                if step < tokens:
                    kv = torch.randn(1, llm.num_kv_heads, tokens - step, head_dim(llm), device=device, dtype=model.dtype)
                    cache.update(kv, kv, 0)
                    kv = None
                ids_1S = torch.randint(llm.vocab_size, (1, step), device=device)
                started_s = _now()
                out = model(ids_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
                model(out.logits.argmax(-1), past_key_values=cache, use_cache=True)
                seconds = _now() - started_s
        except torch.OutOfMemoryError as error:
            print(f"{tokens} tokens do not fit: {str(error).splitlines()[0][:200]}", flush=True)
        else:
            how = f"chunks of {step} tokens, the last one" if options.chunk else "one forward call"
            done(
                {
                    "engine": "transformers",
                    "tokens": tokens,
                    "cache": "bf16",
                    "note": f"{how}: last layer run in {seconds:.1f} s, memory of the others held",
                    "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
                }
            )
            break
        del held, cache, out, kv
        _free()


KINDS = {"engine": engine, "stock": stock, "longest": longest, "stock_longest": stock_longest}


def _stock_model(config: Config, layers: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    llm = config.model.llm
    torch.set_default_dtype(torch.bfloat16)
    with accelerator.device():
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=llm.vocab_size,
                hidden_size=llm.hidden_size,
                intermediate_size=llm.ffn_hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=llm.num_heads,
                num_key_value_heads=llm.num_kv_heads,
                max_position_embeddings=2**22,
                attn_implementation="sdpa",
            )
        ).eval()
    torch.set_default_dtype(torch.float32)
    return model


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
    from megatron_vila.plan.pictures import pictures_of
    from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, references

    if not options.frames:
        return _text(config, tokens), _NoPictures(config)
    video = write_frames(
        options.folder / f"frames_{options.frames}.mp4", options.frames, config.model.vision.image_size
    )
    units = pictures_of(config.model).units(options.frames, True)
    frames = references(str(video), range(options.frames), True, units)
    starts = np.concatenate([[0], np.cumsum([frame.tokens for frame in frames])]).astype(np.int64)
    ids = np.full(starts[-1], MEDIA_TOKEN)
    return Document(ids, np.full(len(ids), IGNORE), frames, starts[:-1], "video"), pictures


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
    started_s, size = _now(), prefix.span.nbytes
    snapshot.save(options.snapshot, prefix, made.topology, "random", str)
    saved_s = _now() - started_s
    del prefix
    _free()
    for file in options.snapshot.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    started_s = _now()
    prefix = snapshot.load(options.snapshot, made.topology, "random", made.span_shape, made.cache_dtype, str)
    loaded_s = _now() - started_s
    made.answer([Request(prefix, np.arange(1, 33))], Sampling(max_new_tokens=1))
    first_s = _now() - started_s
    started_s = _now()
    made.answer([Request(prefix, np.arange(2, 34))], Sampling(max_new_tokens=1))
    again_s = _now() - started_s
    shutil.rmtree(options.snapshot)
    told = (
        f"snapshot of {size / GIB:.2f} GiB: saved in {saved_s:.1f} s, loaded in {loaded_s:.1f} s; first token of another "
        f"question {again_s:.2f} s"
    )
    return {"prefill_s": round(first_s, 2), "prefill_tflops_per_gpu": "", "decode_tokens_per_s": "", "note": told}


def _rates(config: Config, tokens: int, seconds: float) -> dict[str, float]:
    """Floating point operations of the layers; attention as half of a square."""
    llm = config.model.llm
    weights = llm.num_layers * sum(outputs * inputs for outputs, inputs in linear_shapes(llm).values())
    flops = 2 * tokens * weights + 2 * tokens**2 * llm.num_heads * head_dim(llm) * llm.num_layers
    return {"prefill_s": round(seconds, 3), "prefill_tflops_per_gpu": round(flops / seconds / 1e12, 1)}


def _progress(options: argparse.Namespace):
    begun_s, told = time.perf_counter(), [0]

    def tell(tokens: int, frames: int, all_tokens: int) -> None:
        if tokens >= told[0]:
            told[0] = tokens + all_tokens // 8
            print(
                f"{tokens} of {all_tokens} tokens, {frames} frames, {time.perf_counter() - begun_s:.1f} s", flush=True
            )

    return tell


def _now() -> float:
    accelerator.synchronize()
    return time.perf_counter()


def _free() -> None:
    accelerator.collect_garbage()


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

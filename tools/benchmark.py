"""Measure variants side by side; write a CSV table and, beside it, a plot.

Examples:
  python tools/benchmark.py attention --gpus 2 --documents 131072 --variant ulysses=2,kernel=fa4 \
      --variant ring=2,kernel=fa4 --variant ring=2,kernel=flash2,method=plain_ring --out docs/benchmarks/attention.csv
  python tools/benchmark.py layer models/llama3-8b --gpus 2 --layers 4 --lengths 32768,131072 \
      --variant ulysses=2 --variant ring=2 --variant ring=2,method=megatron_p2p --out docs/benchmarks/layer.csv
  python tools/benchmark.py step examples/benchmarks/longvila-7b-4layers-32k.yaml --gpus 2 \
      --variant parallel.ulysses=2,model.attention=fa4 --out docs/benchmarks/step.csv
  python tools/benchmark.py reshard --gpus 2 --frames 2600 --variant ring=2 --variant ring=2,method=full_gather \
      --out docs/benchmarks/reshard.csv
  python tools/benchmark.py vision longvila-7b-stage5 --gpus 1 --frames 256 --variant frame_micro_batch=32 \
      --out docs/benchmarks/vision.csv
  python tools/benchmark.py max-length models/llama3-8b memory.recompute=attention_output parallel.ring=2 --gpus 2 \
      --start 262144 --out docs/benchmarks/max_length.csv
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_vila.benchmark.max_length import search
from megatron_vila.benchmark.step import run_variant
from megatron_vila.benchmark.table import plot_table, write_table
from megatron_vila.benchmark.worker import launch
from megatron_vila.config.load import load_config
from megatron_vila.models.geometry import tokens_per_frame


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_intermixed_args(arguments)
    command = shlex.join(["python", "tools/benchmark.py", *arguments])
    rows = RUN[options.kind](options, command)
    if not rows:
        raise SystemExit("nothing was measured")
    write_table(rows, options.out)
    plot_table(rows, options.out.with_suffix(".png"))
    for row in rows:
        shown = ("model", "variant", "part", "seq_len", "time_s", "tflops_per_gpu", "mfu", "peak_gib", "frames_per_s_per_gpu")
        print({key: row[key] for key in shown if row.get(key) not in (None, "")}, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RUN)
    parser.add_argument("config", nargs="?", help="YAML file or preset (layer, step, vision, max-length)")
    parser.add_argument("overrides", nargs="*", help="overrides of all variants")
    parser.add_argument("--gpus", type=int, required=True, help="processes")
    parser.add_argument("--variant", action="append", default=[], help="settings of one variant, joined by commas")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--timed", type=int, default=5, help="timed steps")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--documents", type=_numbers, default=[131072], help="attention: tokens of each document of the row")
    parser.add_argument("--heads", type=int, default=32, help="attention: query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="attention: key/value heads")
    parser.add_argument("--head-dim", type=int, default=128, help="attention: size of a head")
    parser.add_argument("--layers", type=int, default=4, help="layer: decoder layers")
    parser.add_argument("--lengths", type=_numbers, default=[32768], help="layer: tokens of the row, several joined by commas")
    parser.add_argument("--frames", type=int, default=256, help="reshard: frames of the row; vision: frames of each rank")
    parser.add_argument("--tokens-per-frame", type=int, default=196, help="reshard: LLM tokens of a frame")
    parser.add_argument("--hidden", type=int, default=4096, help="reshard: hidden size")
    parser.add_argument("--start", type=int, default=131072, help="max-length: first length tried")
    parser.add_argument("--unit", type=int, default=32768, help="max-length: lengths are multiples of it")
    parser.add_argument("--most", type=int, default=4194304, help="max-length: no longer than this")
    parser.add_argument("--video", action="store_true", help="max-length: rows of video frames, not of text")
    parser.add_argument("--supervised", type=int, default=1024, help="max-length: supervised tokens of the row")
    parser.add_argument("--limit-s", type=float, default=480, help="max-length: a job that takes longer counts as too long")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _worker(options: argparse.Namespace, command: str) -> list[dict]:
    names = {
        "attention": ("documents", "heads", "kv_heads", "head_dim"),
        "layer": ("config", "overrides", "layers", "lengths"),
        "reshard": ("frames", "tokens_per_frame", "hidden"),
        "vision": ("config", "overrides", "frames"),
    }
    settings = {name: getattr(options, name) for name in (*names[options.kind], "warmup", "timed")}
    return launch(options.kind, options.gpus, settings | {"variants": options.variant or [""], "command": command})


def _step(options: argparse.Namespace, command: str) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, variant in enumerate(options.variant):
            folder = Path(scratch) / str(number)
            try:
                rows.append(
                    run_variant(
                        options.config, options.overrides, variant, options.gpus, options.warmup, options.timed, folder
                    )
                )
            except RuntimeError as error:
                # One variant that does not fit or run must not cost the others' results.
                print(error, flush=True)
                continue
            write_table(rows, options.out)
    return rows


def _max_length(options: argparse.Namespace, command: str) -> list[dict]:
    config = load_config(options.config, options.overrides)
    per_frame = tokens_per_frame(config.model.vision, config.model.projector) + len(config.data.frame_separator_ids)
    lengths = (options.start, options.unit, options.most, per_frame if options.video else 0)
    return search(options.config, options.overrides, options.gpus, *lengths, options.supervised, options.limit_s, command)


RUN = {
    "attention": _worker,
    "layer": _worker,
    "step": _step,
    "reshard": _worker,
    "vision": _worker,
    "max-length": _max_length,
}


if __name__ == "__main__":
    main(sys.argv[1:])

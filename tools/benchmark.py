"""Measure variants side by side; write a CSV table and, beside it, a plot.

Examples:
  python tools/benchmark.py attention --gpus 2 --documents 131072 --variant ulysses=2,kernel=fa4 \
      --variant ring=2,kernel=fa4 --variant ring=2,kernel=flash2,method=plain_ring --out docs/benchmarks/attention.csv
  python tools/benchmark.py layer models/llama3-8b --gpus 2 --layers 4 --lengths 32768,131072 \
      --variant ulysses=2 --variant ring=2 --variant ring=2,method=megatron_p2p --out docs/benchmarks/layer.csv
  python tools/benchmark.py step models/llama3-8b optim.grad_reduce_fp32=false --gpus 2 --lengths 32768 \
      --variant parallel.ulysses=2,memory.recompute=attention_output --out docs/benchmarks/step.csv
  python tools/benchmark.py head --gpus 1 --tokens 131072 --variant method=fused --out docs/benchmarks/head.csv
  python tools/benchmark.py reshard --gpus 2 --frames 2600 --variant ring=2 --variant ring=2,method=full_gather \
      --out docs/benchmarks/reshard.csv
  python tools/benchmark.py vision longvila-7b-stage5 --gpus 1 --frames 256 --variant frame_micro_batch=32 \
      --out docs/benchmarks/vision.csv
  python tools/benchmark.py max-length models/llama3-8b memory.recompute=attention_output parallel.ring=2 --gpus 2 \
      --partial 2 --start 262144 --out docs/benchmarks/max_length.csv
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.errors import entry_point

TRIAL = ("config", "overrides", "lengths", "video", "supervised", "short_warmup", "partial", "without_attention")
SETTINGS = {
    "attention": ("documents", "heads", "kv_heads", "head_dim"),
    "layer": ("config", "overrides", "layers", "lengths"),
    "head": ("tokens", "hidden", "vocab"),
    "step": TRIAL,
    "reshard": ("frames", "tokens_per_frame", "hidden"),
    "vision": ("config", "overrides", "frames"),
    "max-length": TRIAL,
}
"""What the ranks of each benchmark are told, beside variants and the number of steps."""

ENVIRONMENT = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that change times or memory: where one is set, it stands before the command of a row."""


@entry_point
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(arguments)
    # Imported late: --help needs no torch.
    from benchmarks.max_length import longest, trains
    from benchmarks.table import plot_table, write_table
    from benchmarks.worker import launch

    # As Ctrl-C does, so that the job is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    environment = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    command = shlex.join([*environment, "python", "tools/benchmark.py", *arguments])
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        """Show the row and write the table: a job that ends early has lost nothing."""
        rows.append(row)
        rows.sort(key=lambda row: row["seq_len"] if options.kind == "max-length" else 0)
        write_table(rows, options.out)
        shown = ("model", "variant", "part", "seq_len", "time_s", "tflops_per_gpu", "mfu", "peak_gib", "predicted_gib")
        print({key: row[key] for key in (*shown, "frames_per_s_per_gpu", "note") if row.get(key) not in (None, "")}, flush=True)

    settings = {name: getattr(options, name) for name in (*SETTINGS[options.kind], "warmup", "timed")}
    settings |= {"variants": options.variant or [""], "command": command}
    if options.kind == "max-length":
        fits = trains(options.gpus, settings, options.limit_s, keep)
        longest(fits, options.start, options.unit, options.most, options.share)
    else:
        launch("trial" if options.kind == "step" else options.kind, options.gpus, settings, on_row=keep)
    if not rows:
        raise SystemExit("nothing was measured")
    plot_table(rows, options.out.with_suffix(".png"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SETTINGS)
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
    parser.add_argument("--lengths", type=_numbers, default=[32768], help="layer, step: tokens of the row, joined by commas")
    parser.add_argument("--frames", type=int, default=256, help="reshard: frames of the row; vision: frames of each rank")
    parser.add_argument("--tokens-per-frame", type=int, default=196, help="reshard: LLM tokens of a frame")
    parser.add_argument("--hidden", type=int, default=4096, help="reshard, head: hidden size")
    parser.add_argument("--tokens", type=int, default=131072, help="head: supervised tokens")
    parser.add_argument("--vocab", type=int, default=152064, help="head: rows of the output layer")
    parser.add_argument("--start", type=int, default=131072, help="max-length: first length tried")
    parser.add_argument("--unit", type=int, default=32768, help="max-length: lengths are multiples of it")
    parser.add_argument("--most", type=int, default=4194304, help="max-length: no longer than this")
    parser.add_argument("--share", type=float, default=0.0, help="max-length: end once this share of the result is open")
    parser.add_argument("--video", action="store_true", help="step, max-length: rows of video frames, not of text")
    parser.add_argument("--supervised", type=int, default=0, help="step, max-length: supervised tokens of the row; 0: all")
    parser.add_argument("--short-warmup", action="store_true", help="step, max-length: two warm-up steps on rows of an eighth")
    parser.add_argument(
        "--partial", type=int, default=0, help="step, max-length: backward pass of so many layers, no update; 0: whole steps"
    )
    parser.add_argument(
        "--without-attention", action="store_true", help="step, max-length: attention takes memory, not time; for memory alone"
    )
    parser.add_argument("--limit-s", type=float, default=480, help="max-length: a job that takes longer counts as too long")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

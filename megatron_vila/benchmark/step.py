"""Whole training steps in several variants, each a real run of the trainer, measured from its own metrics.

A variant is a set of configuration overrides. Steps are synchronised by the loss that is read after each, so the wall time of a
step is its own. Protocol of LongVILA section 4: warm-up steps, then timed ones, the median reported.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vila.benchmark.table import hardware, versions
from megatron_vila.config.load import load_config
from megatron_vila.training.summary import METRICS_FILE


def run_variant(
    config: str, common: Sequence[str], variant: str, gpus: int, warmup: int, timed: int, folder: Path
) -> dict[str, Any]:
    """Train ``warmup + timed`` steps of ``config`` with the overrides of ``variant`` (joined by commas) on ``gpus`` processes.

    Returns one row of the table. Raises ``RuntimeError`` with the end of the run's output if it fails.
    """
    run_settings = [
        f"train.steps={warmup + timed}",
        f"train.output={folder}",
        "checkpoint.resume=false",
        "checkpoint.save=false",
    ]
    overrides = [*common, *variant.split(","), *run_settings]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += ["-m", "megatron_vila.train", config, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"variant {variant} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    every = [record for record in records if "loss" in record]
    steps = every[warmup:]
    run = load_config(config, overrides)
    seconds = statistics.median(step["step_s"] for step in steps)
    flops = statistics.median(step["model_flops"] for step in steps)
    tokens = statistics.median(step["tokens"] for step in steps)
    return {
        "model": run.model.name,
        "variant": variant,
        "gpus": gpus,
        **{name: getattr(run.parallel, name) for name in ("tp", "pp", "ulysses", "ring")},
        "attention": run.model.attention,
        "seq_len": int(tokens // run.train.global_batch_size),
        "frames": int(statistics.median(step["frames"] for step in steps) // run.train.global_batch_size),
        "time_s": round(seconds, 4),
        "tokens_per_s_per_gpu": round(tokens / seconds / gpus, 1),
        "tflops_per_gpu": round(flops / seconds / gpus / 1e12, 1),
        "mfu": "" if steps[-1]["mfu"] is None else round(statistics.median(step["mfu"] for step in steps), 4),
        "peak_gib": round(max(step["peak_memory_gib"] for step in steps), 2),
        # Before the first update all variants have the same weights: their losses differ by rounding alone.
        "first_loss": round(every[0]["loss"], 5),
        "hardware": hardware(gpus),
        "versions": versions(),
        "command": f"torchrun --nproc-per-node {gpus} -m megatron_vila.train {config} "
        + " ".join(overrides[: -len(run_settings) + 1]),
    }

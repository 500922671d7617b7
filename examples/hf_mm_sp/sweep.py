"""Tokens per second and the longest sequence of a stock Transformers model, with and without MM-SP.

Each measurement is a run of train.py in processes of its own, so that one which runs out of memory costs nothing but itself.
Variants: ``stock`` (FSDP2, Transformers' attention and loss), ``data parallel`` (MM-SP's kernel and loss, nothing shared),
ulysses and ring over all processes. At the lengths of the table every variant gives all processes together the same tokens per
step: one sequence for each process without sharing, as many sequences one after the other with it. In the search it is one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.max_length import longest
from benchmarks.table import hardware, versions, write_table

SPEED, FIT = (3, 5), (1, 1)
"""Steps before the timed ones and timed ones: of a length in the table, and of the search, where the second step already has all
that a step holds."""
LIMIT_S = 1800


def variants(processes: int) -> dict[str, list[str]]:
    """Arguments of train.py for each variant."""
    return {
        "stock": ["--stock"],
        "data parallel": [],
        f"ulysses={processes}": ["--ulysses", str(processes)],
        f"ring={processes}": ["--ring", str(processes)],
    }


def sweep(options: argparse.Namespace) -> None:
    """Measure every variant at ``--lengths``, then search its longest sequence up to ``--longest``; write ``--benchmark``."""
    rows = []
    for variant, settings in variants(options.processes).items():
        if options.variants and variant not in options.variants:
            continue
        done: dict[int, bool] = {}

        def fits(length: int, steps=FIT, variant=variant, settings=settings, done=done) -> bool:
            if length not in done:
                row = measure(options, variant, settings, length, steps)
                rows.append(row)
                write_table(rows, options.benchmark)
                found = f"{row['tokens_per_s_per_gpu']} tokens/s for each process  {row['peak_gib']} GiB"
                print(f"{variant}  {length} tokens: {row['note'] or found}", flush=True)
                done[length] = not row["note"]
            return done[length]

        for length in options.lengths:
            if not fits(length, SPEED):
                break
        fitting = max((n for n, ok in done.items() if ok), default=0)
        if fitting:
            longest(fits, start=fitting, unit=1, most=options.longest, share=options.share)


def measure(
    options: argparse.Namespace, variant: str, settings: list[str], length: int, steps: tuple[int, int]
) -> dict[str, str | int | float]:
    """One run as a row of the table; a run that fails is a row too, with the reason as its note."""
    warmup, timed = steps
    shared = {"--ulysses", "--ring"} & set(settings)
    source = ["--model", str(options.model)] if options.model else ["--config", str(options.config)]
    arguments = [
        *source,
        *settings,
        "--length",
        str(length),
        "--samples",
        "1",
        "--steps",
        str(warmup + timed),
        "--accumulate",
        str(options.processes if shared and steps == SPEED else 1),
        "--recompute",
    ]
    arguments += ["--kernel", options.kernel, *(["--data", *map(str, options.data)] if options.data else [])]
    script = str(Path(__file__).with_name("train.py"))
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(options.processes),
        ]
        try:
            run = subprocess.run(
                [*launch, script, *arguments, "--out", folder], capture_output=True, text=True, timeout=LIMIT_S
            )
            output, code = run.stdout + run.stderr, run.returncode
        except subprocess.TimeoutExpired:
            output, code = f"no end after {LIMIT_S} s", 1
        metrics = (
            [] if code else [read_metrics(Path(folder) / f"metrics-{rank}.jsonl") for rank in range(options.processes)]
        )
    row = {
        "model": str(options.model or options.config),
        "variant": variant,
        "gpus": options.processes,
        "seq_len": length,
        "time_s": "",
        "tokens_per_s_per_gpu": "",
        "peak_gib": "",
        "first_loss": "",
        "note": reason(output) if code else "",
        "hardware": hardware(options.processes),
        "versions": versions(),
        "command": " ".join([f"torchrun --nproc-per-node {options.processes} examples/hf_mm_sp/train.py", *arguments]),
    }
    if metrics:
        measured = metrics[0][warmup:]
        row["time_s"] = round(statistics.median(step["seconds"] for step in measured), 4)
        row["tokens_per_s_per_gpu"] = round(measured[0]["tokens"] / row["time_s"] / options.processes, 1)
        row["peak_gib"] = round(max(step["peak_gib"] for rank in metrics for step in rank), 2)
        row["first_loss"] = round(metrics[0][0]["loss"], 5)
    return row


def reason(output: str) -> str:
    """Why a run failed, in one line."""
    if "out of memory" in output.lower() or "OutOfMemoryError" in output:
        return "out of memory"
    errors = [line for line in output.splitlines() if re.search(r"\w*Error: \S", line)] or output.splitlines()[-1:]
    return "failed: " + (errors[0].strip()[:200] if errors else "no output")


def read_metrics(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

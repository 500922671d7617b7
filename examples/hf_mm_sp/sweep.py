"""Tokens per second and the longest sequence of a stock Transformers model, with and without MM-SP.

Each measurement is a run of train.py in processes of its own, so that one which runs out of memory costs nothing but itself.
Variants: ``stock`` (FSDP2, Transformers' attention and loss), ``data parallel`` (MM-SP's kernel and loss, nothing shared),
ulysses and ring over all processes. Every variant gives all processes together the same tokens per step: one sequence for
each process without sharing, as many sequences one after the other with it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import platform as host
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

WARMUP, TIMED = 3, 5
LIMIT_S = 1800
COLUMNS = (
    "model", "variant", "processes", "length", "result", "tokens_per_s", "step_s", "peak_gib", "first_loss", "hardware",
    "versions", "command",
)  # fmt: skip


def variants(processes: int) -> dict[str, list[str]]:
    """Arguments of train.py for each variant."""
    share = ["--accumulate", str(processes)]
    return {
        "stock": ["--stock"],
        "data parallel": [],
        f"ulysses={processes}": ["--ulysses", str(processes), *share],
        f"ring={processes}": ["--ring", str(processes), *share],
    }


def sweep(options: argparse.Namespace) -> None:
    """Measure every variant at ``--lengths``, then search its longest sequence up to ``--longest``; write ``--benchmark``."""
    rows = []
    for variant, settings in variants(options.processes).items():
        done: dict[int, bool] = {}

        def fits(length: int, variant=variant, settings=settings, done=done) -> bool:
            if length not in done:
                row = measure(options, variant, settings, length)
                rows.append(row)
                write_table(rows, options.benchmark)
                print(
                    f"{variant}  {length} tokens: {row['result']}  {row['tokens_per_s']} tokens/s  {row['peak_gib']} GiB",
                    flush=True,
                )
                done[length] = row["result"] == "ok"
            return done[length]

        for length in options.lengths:
            if not fits(length):
                break
        search_longest(fits, max((n for n, ok in done.items() if ok), default=0), options.longest)


def search_longest(fits, fitting: int, limit: int) -> int:
    """The longest length that fits, to an eighth: doubled while it fits, then halved in between. 0 if ``fitting`` is 0."""
    failing = None
    while fitting and failing is None and fitting * 2 <= limit:
        if fits(fitting * 2):
            fitting *= 2
        else:
            failing = fitting * 2
    while failing is not None and failing - fitting > max(fitting // 8, 1):
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting


def measure(
    options: argparse.Namespace, variant: str, settings: list[str], length: int
) -> dict[str, str | int | float]:
    """One run as a row of the table; a run that fails is a row too, with the reason."""
    source = ["--model", str(options.model)] if options.model else ["--config", str(options.config)]
    arguments = [
        *source,
        *settings,
        "--length",
        str(length),
        "--samples",
        "1",
        "--steps",
        str(WARMUP + TIMED),
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
        "processes": options.processes,
        "length": length,
        "result": "ok" if not code else reason(output),
        "tokens_per_s": "",
        "step_s": "",
        "peak_gib": "",
        "first_loss": "",
        "hardware": hardware(options.processes),
        "versions": versions(),
        "command": " ".join([f"torchrun --nproc-per-node {options.processes} examples/hf_mm_sp/train.py", *arguments]),
    }
    if metrics:
        timed = metrics[0][WARMUP:]
        row["step_s"] = round(statistics.median(step["seconds"] for step in timed), 4)
        row["tokens_per_s"] = round(timed[0]["tokens"] / row["step_s"], 1)
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


def hardware(processes: int) -> str:
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"CPU {host.machine()}, {processes} processes"


def versions() -> str:
    found = []
    for package in ("torch", "transformers", "flash-attn-4"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write_table(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)

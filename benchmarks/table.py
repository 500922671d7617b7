"""Tables of measurements: one row per variant with what is needed to repeat it, as CSV and as a bar chart."""

from __future__ import annotations

import csv
import importlib.metadata
import platform as host
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vila import accelerator
from megatron_vila.plan.flops import mfu

COLUMNS = (
    "model", "variant", "part", "gpus", "tp", "pp", "ulysses", "ring", "attention", "seq_len", "frames", "time_s",
    "vision_s", "tokens_per_s_per_gpu", "frames_per_s_per_gpu", "tflops_per_gpu", "mfu", "peak_gib", "predicted_gib", "host_gib",
    "first_loss", "note", "hardware", "versions", "command",
)  # fmt: skip
"""Columns of every table in their order."""

ALWAYS = (
    "model", "variant", "gpus", "tp", "ulysses", "ring", "seq_len", "time_s", "tflops_per_gpu", "mfu", "peak_gib", "hardware",
    "versions", "command",
)  # fmt: skip
"""Columns that every table has; of the others it has those that it fills."""

RATES = ("tflops_per_gpu", "tokens_per_s_per_gpu", "frames_per_s_per_gpu")
"""What a plot shows: the first of them that all rows have. A search for the longest row has none, its plot shows lengths."""


def hardware(gpus: int) -> str:
    if torch.cuda.is_available():
        return f"{gpus} x {torch.cuda.get_device_name()}"
    return f"CPU {host.machine()}, {gpus} processes"


def versions() -> str:
    """Versions of the packages that the numbers depend on."""
    found = []
    kernels = "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "transformer-engine"
    for package in ("torch", "megatron-core", "transformers", *kernels):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def rates(flops_per_s: float) -> dict[str, Any]:
    """Columns for the model FLOP/s of one of our GPUs; its MFU is empty where its peak is not known."""
    share = mfu(flops_per_s, 1.0, 1, accelerator.machine().peak_flops)
    return {"tflops_per_gpu": float(f"{flops_per_s / 1e12:.4g}"), "mfu": "" if share is None else round(share, 4)}


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows with the columns of ``ALWAYS`` and those that any of them fills, in the order of ``COLUMNS``."""
    columns = [name for name in COLUMNS if name in ALWAYS or any(row.get(name) not in (None, "") for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def plot_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of one of ``RATES``, or of lengths."""
    # Drawing is the last thing that a benchmark does, and matplotlib is slow to import.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measure = next(name for name in (*RATES, "seq_len") if all(row.get(name) not in (None, "") for row in rows))
    labels = [" ".join(str(row[name]) for name in ("model", "variant", "part", "seq_len") if row.get(name)) for row in rows]
    if len({str(row["gpus"]) for row in rows}) > 1:
        labels = [f"{label} gpus={row['gpus']}" for label, row in zip(labels, rows, strict=True)]
    figure, axes = pyplot.subplots(figsize=(8, 0.7 + 0.32 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), [float(row[measure]) for row in rows], tick_label=labels, color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlabel(measure.replace("_", " "))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

"""Measurements that need process groups: a command starts one torchrun, whose ranks run all variants one after the other.

Running the variants in one job makes their ratios fair: same GPUs, same clocks, same minutes.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.table import hardware, versions
from megatron_vila import accelerator, processes
from megatron_vila.plan.budgets import GIB

_QUEUEING_CYCLES = 40_000_000  # some 20 ms


@dataclass(frozen=True)
class Measured:
    """Median seconds over the timed calls, the slowest rank's; most bytes in use on a rank."""

    seconds: float
    peak_bytes: int

    def columns(self, predicted_bytes: float | None) -> dict[str, Any]:
        """Of a table, beside the memory that was predicted (None: it is not modeled)."""
        return {
            "time_s": round(self.seconds, 6),
            "peak_gib": round(self.peak_bytes / GIB, 3),
            "predicted_gib": "" if predicted_bytes is None else round(predicted_bytes / GIB, 3),
        }


def measure(call: Callable[[], Any], warmup: int, timed: int) -> Measured:
    """Time ``call`` on all ranks together. Each call starts when the device and all ranks are done with the one before.

    On CUDA it is queued while the device waits, as in training, where the host runs ahead. Collective over all ranks.
    """
    for _ in range(warmup):
        call()
    accelerator.synchronize()
    accelerator.reset_peak_memory()
    seconds = []
    for _ in range(timed):
        dist.barrier()
        accelerator.synchronize()
        seconds.append(_seconds(call))
    worst = torch.tensor([*seconds, accelerator.peak_memory_bytes()], dtype=torch.float64, device=accelerator.device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    *seconds, peak = worst.tolist()
    return Measured(statistics.median(seconds), int(peak))


def _seconds(call: Callable[[], Any]) -> float:
    if accelerator.device().type != "cuda":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUEING_CYCLES)
    dist.all_reduce(torch.zeros((), device=accelerator.device()))  # their devices start together
    start.record()
    call()
    torch.cuda.synchronize()  # all streams
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measured_rows(kind: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of all ``variants``, at each of ``lengths`` if ``settings`` name some. Collective over all ranks.

    ``rows(settings, text)`` of the module ``kind`` measures one variant. It finds in ``settings`` what the top of the module
    lists, the ``length`` of this row, ``warmup`` and ``timed`` (steps).
    """
    world = dist.get_world_size()
    same = {"gpus": world, "hardware": hardware(world), "versions": versions(), "command": settings["command"]}
    of_variant = importlib.import_module(f"benchmarks.{kind}").rows
    for length in settings.get("lengths", [0]):
        for text in settings["variants"]:
            for row in of_variant(settings | {"length": length}, text):
                yield {"variant": text} | row | same


def one_by_one(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; before the next is measured, the memory of the one before is free."""
    for row in rows:
        yield row
        accelerator.collect_garbage()


def parse_variant(text: str, known: dict[str, Any]) -> dict[str, Any]:
    """``ulysses=2,kernel=fa4`` over the defaults ``known``; a tuple names all choices, the default first.

    Raises ``ValueError`` for an unknown name, an unknown choice or a wrong type.
    """
    values = {name: default[0] if isinstance(default, tuple) else default for name, default in known.items()}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known:
            raise ValueError(f"variant {text}: {name} is unknown; use {', '.join(known)}")
        if isinstance(known[name], tuple) and value not in known[name]:
            raise ValueError(f"variant {text}: {name}={value} is unknown; use {' or '.join(known[name])}")
        try:
            values[name] = type(values[name])(value)
        except ValueError as error:
            raise ValueError(f"variant {text}: {name}={value} should be of type {type(values[name]).__name__}") from error
    return values


def launch(
    kind: str,
    gpus: int,
    settings: dict[str, Any],
    timeout_s: float = math.inf,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Run ``kind`` on ``gpus`` processes; ``on_row`` gets each row as soon as it is measured. Returns the finished rows.

    Raises ``RuntimeError`` with the end of the output if the job failed before its first row.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows_file, output_file = Path(folder) / "rows.jsonl", Path(folder) / "output.txt"
        rows_file.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command += ["-m", "benchmarks.worker", kind, json.dumps(settings), str(rows_file)]
        end_s = time.monotonic() + timeout_s
        with output_file.open("w") as output, rows_file.open() as lines:
            # The ranks take the package from where this process has it.
            place = str(Path(__file__).resolve().parents[1])
            path = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH")]))
            job = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path}
            )
            try:
                running = True
                while running and time.monotonic() < end_s:
                    running = job.poll() is None
                    for line in lines:
                        rows.append(json.loads(line))
                        on_row(rows[-1])
                    time.sleep(0.2 * running)
            finally:
                late = job.poll() is None
                if late:  # torchrun ends its processes
                    job.terminate()
                job.wait()
        said = f"stopped after {timeout_s:.0f} s\n" * late + output_file.read_text(errors="replace")
    if job.returncode and not rows:
        raise RuntimeError(f"{said[-3000:]}\n{kind} on {gpus} processes failed: {_reason(said)}")
    if job.returncode:
        print(f"{kind} ended early, finished rows are kept ({len(rows)}): {_reason(said)}", flush=True)
    return rows


def _reason(output: str) -> str:
    """The line of a job's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines()]
    errors = re.compile(r"(?<!ChildFailed)Error: .|^stopped after ")
    said = [line for line in lines if errors.search(line)]
    return (said or lines or [""])[-1]


def main(arguments: Sequence[str]) -> None:
    kind, settings, rows_file = arguments
    accelerator.prepare()
    processes.init_distributed()
    with open(rows_file, "a", encoding="utf-8") as file:
        for row in one_by_one(measured_rows(kind, json.loads(settings))):
            if dist.get_rank() == 0:
                file.write(json.dumps(row) + "\n")
                file.flush()  # the parent reads along
    processes.end_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])

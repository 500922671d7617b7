"""Loading measured, as CSV: training that is fed from files, and loaders side by side on the host alone.

``train`` runs the trainer on one GPU, once for each case, and takes the numbers from its own metrics: prepared shards of a
recording, the recording itself decoded by cores, by the GPU's video engines, and by both. ``loaders`` reads the same frames of
the same file by this package and by a plain PyTorch ``DataLoader``, with PyAV and with torchcodec, one after the other.

  python -m benchmarks.data train examples/benchmarks/longvila-7b-4layers-32k.yaml --cases prepared,cores,engines,both \
      --out docs/benchmarks/data.csv
  python -m benchmarks.data loaders --cases ours,pyav,torchcodec --out docs/benchmarks/data.csv
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recording import write_recording, write_records
from benchmarks.table import hardware
from megatron_vila.data.video import probe_video
from megatron_vila.plan.budgets import GIB

COLUMNS = (
    *("case", "source", "gpus", "cores", "frames", "step_s", "data_wait_s", "source_frames_per_s", "sampled_frames_per_s"),
    *("host_gib", "hardware", "versions", "command"),
)
ROOT = Path(__file__).resolve().parents[1]
WARMUP = 12
"""Steps that are not counted: code is compiled in them, nothing is decoded ahead before the first, and video engines join in."""

DECODERS = {"cores": "cpu", "engines": "nvdec", "both": "auto", "prepared": "auto"}
IMAGE_SIZE = 384


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.data", *arguments])
    recording = options.file or write_recording(options.folder / f"recording_{options.seconds}s.mp4", options.seconds)
    found = []
    for case in options.cases.split(","):
        row = train(case, recording, options) if options.kind == "train" else loader(case, recording, options)
        found.append(row | {"hardware": hardware(row["gpus"]), "versions": _versions(), "command": command})
        print({key: value for key, value in found[-1].items() if key not in ("versions", "command")}, flush=True)
        _write(options.out, found)
    return 0


def train(case: str, recording: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A run of the trainer on one GPU."""
    records = write_records(recording, copies=8)
    source = prepared(records) if case == "prepared" else records
    output = options.folder / f"run_{case}"
    overrides = [
        *(f"data.train=[{source}]", f"data.video_decoder={DECODERS[case]}", f"train.steps={options.steps}", "train.log_every=1"),
        *(f"train.output={output}", "checkpoint.save=false", "checkpoint.resume=false", *options.overrides),
    ]
    command = [sys.executable, "-m", "megatron_vila.launch", "--nproc-per-node", "1", options.config, *overrides]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=options.limit_s)
    if done.returncode:
        raise SystemExit(f"the run of case {case} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    print(*[line for line in done.stdout.splitlines() if "waiting for data" in line or "decoded on the host" in line], sep="\n")
    records_of_steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records_of_steps if "loss" in record][WARMUP:]
    seconds = sum(step["step_s"] for step in steps)

    def rate(name: str) -> float:
        return sum(step[name] * step["step_s"] for step in steps) / seconds

    return {
        "case": case,
        "source": "shards" if case == "prepared" else "recording",
        "gpus": 1,
        "cores": len(os.sched_getaffinity(0)),
        "frames": steps[-1]["frames"],
        "step_s": round(seconds / len(steps), 3),
        "data_wait_s": round(statistics.mean(step["data_wait_s"] for step in steps), 3),
        "source_frames_per_s": round(rate("source_frames_per_s"), 1),
        "sampled_frames_per_s": round(rate("decoded_frames_per_s"), 1),
        "host_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB, 2),
    }


def prepared(records: Path) -> Path:
    """The recording as shards, unless they are there."""
    folder = records.with_name("shards")
    if not folder.exists():
        subprocess.run([sys.executable, str(ROOT / "tools/prepare_data.py"), str(records), "--out", str(folder)], check=True)
    return folder


def loader(case: str, recording: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of ``options.frames`` frames read by one of ``LOADERS``, for ``options.steps`` rows after the first."""
    indices = np.linspace(0, probe_video(recording).num_frames - 1, options.frames).round().astype(int)
    cores = len(os.sched_getaffinity(0))
    measured = LOADERS[case](_Task(recording, tuple(indices.tolist()), cores, options.steps))
    times = np.diff(measured.times)
    sampled = options.frames * len(times) / times.sum()
    return {
        "case": case,
        "source": options.file.stem if options.file else "recording",
        "gpus": 0,
        "cores": cores,
        "frames": options.frames,
        "step_s": round(float(times.mean()), 3),
        "data_wait_s": round(float(times.mean()), 3),
        "source_frames_per_s": round(float(sampled * (indices[-1] + 1) / len(indices)), 1),
        "sampled_frames_per_s": round(float(sampled), 2),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2) if case == "ours" else "",
    }


@dataclass(frozen=True)
class _Task:
    file: Path
    indices: tuple[int, ...]
    cores: int
    rows: int


@dataclass(frozen=True)
class _Measured:
    times: list[float]
    """when each row was there, the first one included"""


def _ours(task: _Task) -> _Measured:
    from megatron_vila.data.failures import FailureReasons
    from megatron_vila.data.row_decoder import RowDecoder
    from megatron_vila.plan.pictures import Unit
    from megatron_vila.plan.row import Document, FrameRef

    refs = tuple(FrameRef(str(task.file), (index,), True, Unit(1, 1, 1, 1)) for index in task.indices)
    document, times = Document(np.zeros(1), np.zeros(1), refs, np.zeros(1), "recording"), []
    decoder = RowDecoder(lru_cache(probe_video), FailureReasons(), image_size=IMAGE_SIZE, aspect="resize", workers=task.cores)
    pending = [decoder.submit(turn, [document], range(len(refs))) for turn in range(2)]
    for turn in range(task.rows + 1):
        pending.append(decoder.submit(turn + 2, [document], range(len(refs))))
        assert len(pending.pop(0).result().pixels) == len(refs)
        times.append(time.perf_counter())
    decoder.close()
    return _Measured(times)


class _Videos:
    """What a PyTorch user writes first: a map-style data set that gives the pixels of one video."""

    def __init__(self, task: _Task, read: Callable[[_Task], Iterable[np.ndarray]]) -> None:
        self.task, self.read = task, read

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int):
        import torch
        from PIL import Image

        from megatron_vila.data.images import preprocess

        torch.set_num_threads(1)
        return preprocess([Image.fromarray(picture) for picture in self.read(self.task)], IMAGE_SIZE)


def _by_pyav(task: _Task) -> Iterable[np.ndarray]:
    import av

    wanted = set(task.indices)
    with av.open(str(task.file)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                yield frame.to_ndarray(format="rgb24")


def _by_torchcodec(task: _Task) -> Iterable[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(task.file), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    for first in range(0, len(task.indices), 16):  # all of them would take a gigabyte
        yield from decoder.get_frames_at(list(task.indices[first : first + 16])).data.numpy()


def _data_loader(read: Callable[[_Task], Iterable[np.ndarray]], task: _Task) -> _Measured:
    from torch.utils.data import DataLoader

    times = []
    batches = iter(DataLoader(_Videos(task, read), batch_size=None, num_workers=task.cores, prefetch_factor=2))
    for _ in range(task.rows + 1):
        assert len(next(batches)) == len(task.indices)
        times.append(time.perf_counter())
    return _Measured(times)


LOADERS: dict[str, Callable[[_Task], _Measured]] = {
    "ours": _ours,
    "pyav": lambda task: _data_loader(_by_pyav, task),
    "torchcodec": lambda task: _data_loader(_by_torchcodec, task),
}


def _versions() -> str:
    found = []
    for package in ("torch", "av", "torchcodec", "pillow", "megatron-core"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add ``rows`` to the table, in the place of earlier ones of the same case, number of GPUs and cores."""
    kept = list(csv.DictReader(path.open())) if path.exists() else []
    key = lambda row: tuple(str(row[name]) for name in ("case", "source", "gpus", "cores", "frames"))  # noqa: E731
    new = {key(row) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*(row for row in kept if key(row) not in new), *rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("train", "loaders"))
    parser.add_argument("config", nargs="?", help="train: YAML file or preset")
    parser.add_argument("overrides", nargs="*", help="train: overrides of the configuration")
    parser.add_argument("--cases", required=True, help=f"train: of {', '.join(DECODERS)}; loaders: of {', '.join(LOADERS)}")
    parser.add_argument("--folder", type=Path, default=Path("data/benchmark"), help="where recording, shards and runs are")
    parser.add_argument("--seconds", type=int, default=160, help="length of the recording")
    parser.add_argument("--file", type=Path, help="loaders: a video to read in the place of the recording")
    parser.add_argument("--frames", type=int, default=160, help="loaders: frames of a row")
    parser.add_argument("--steps", type=int, default=16, help="steps of a run, or rows read")
    parser.add_argument("--limit-s", type=float, default=600.0, help="train: a run that takes longer ends the benchmark")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, to which the rows are added")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

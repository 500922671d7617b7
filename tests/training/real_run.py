"""Runs of the real trainer on real video files: a model that takes milliseconds a step, and what a run leaves behind.

Functions that take ``rank`` first run on the rank pool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_vila import accelerator
from megatron_vila.checkpoint.save_load import load_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.data.synthetic import corpus, write_synthetic_set
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.start_checks import check_start
from megatron_vila.training.start import make_trainer
from megatron_vila.training.summary import read_metrics
from tests import exit_threads

REPOSITORY = Path(__file__).parents[2]

SMALL_MODEL = [
    "model.llm.num_layers=4", "model.llm.hidden_size=32", "model.llm.num_heads=4", "model.llm.num_kv_heads=2",
    "model.llm.ffn_hidden_size=32", "model.vision.hidden_size=16", "model.vision.num_layers=2",
    "model.vision.num_heads=2", "model.vision.ffn_hidden_size=16", "model.vision.image_size=28",
    "model.vision.frame_micro_batch=4", "model.init_std=0.1", "optim.lr=1e-2", "optim.warmup_fraction=0",
    # A gradient that is zero but for rounding (key biases) must not become a whole step of Adam.
    "optim.eps=1e-3",
    "train.precision=fp64", "train.deterministic=true", "train.global_batch_size=4", "train.seq_length=128",
    "data.num_frames=6", "data.workers=1", "data.prefetch=2",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A grid: ``str`` gives the overrides; dp follows from ``world``."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    ulysses: int = 1
    ring: int = 1

    def overrides(self) -> list[str]:
        return [f"parallel.{axis}={getattr(self, axis)}" for axis in ("tp", "pp", "ulysses", "ring")]

    def __str__(self) -> str:
        dp = self.world // (self.tp * self.pp * self.ulysses * self.ring)
        return f"dp{dp}-tp{self.tp}-pp{self.pp}-ulysses{self.ulysses}-ring{self.ring}"


def write_videos(folder: Path) -> Path:
    """Videos of 3 and 6 frames and single pictures with questions, and a tokenizer."""
    write_synthetic_set(folder, [3, 6], 8, 8, images=True, size=28)
    train_tokenizer(corpus(), folder / "tokenizer", 400)
    return folder


def overrides(videos: Path, output: Path, *more: str, train: Sequence[str] = ("3", "6", "image")) -> list[str]:
    files = ",".join(str(videos / f"train_{name}.json") for name in train)
    return [
        *SMALL_MODEL,
        f"data.train=[{files}]",
        f"data.tokenizer={videos / 'tokenizer'}",
        f"train.output={output}",
        *more,
    ]


def train(rank: int, settings: Sequence[str], stop_at: int | None = None) -> dict:
    """The run's summary. Rank 1 (or a lone rank) gets a SIGTERM once ``stop_at`` steps are written."""
    config = load_config("tiny", settings)
    check_start(config, torch.distributed.get_world_size(), accelerator.machine())
    done = threading.Event()
    if stop_at is not None and rank == torch.distributed.get_world_size() - 1:
        threading.Thread(target=_terminate_at, args=(config.train.output, stop_at, done), daemon=True).start()
    try:
        return make_trainer(config).run()
    finally:
        done.set()
        accelerator.set_deterministic(False)


def _terminate_at(output: str, step: int, done: threading.Event) -> None:
    path = Path(output) / "metrics.jsonl"
    while not done.is_set():
        if path.exists() and len(path.read_text().splitlines()) >= step:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.002)


def weights(rank: int, settings: Sequence[str], checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole model of a checkpoint, loaded by one process."""
    config = load_config("tiny", settings)
    config.parallel = ParallelConfig()
    topology = ParallelTopology.create(config.parallel)
    model = VilaModel(config, topology, accelerator.dtype_of(config.train.precision), torch.device("cpu"))
    load_checkpoint(checkpoint, [model])
    topology.destroy()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def numbers(output: Path) -> list[tuple]:
    """What each step of a run came to, as written to metrics.jsonl: nothing in it depends on the clock."""
    names = ("step", "loss", "grad_norm", "lr_llm", "tokens", "supervised_tokens", "frames", "model_flops", "skipped")
    return [tuple(record[name] for name in names) for record in read_metrics(output)[0]]


def command(*arguments: str, processes: int = 1) -> list[str]:
    """How a user starts the trainer: torchrun for more than one process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = torchrun if processes > 1 else []
    return [sys.executable, *launcher, "-m", "megatron_vila.train", *arguments]


def environment() -> dict[str, str]:
    ours = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": f"{exit_threads.HOOK}:{REPOSITORY}",
    }
    return os.environ | ours


@contextmanager
def started(*arguments: str, processes: int = 1) -> Iterator[subprocess.Popen]:
    """``python -m megatron_vila.train`` as a user starts it, its messages on stdout; no process outlives the block."""
    process = subprocess.Popen(
        command(*arguments, processes=processes), env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        # torchrun gives each worker a session of its own: they are found as its children.
        for pid in (*children(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def launch(*arguments: str, processes: int = 1, timeout_s: float = 150) -> tuple[int, str]:
    """Exit status and output of a whole run; a hang fails the test."""
    with started(*arguments, processes=processes) as process:
        said, _ = process.communicate(timeout=timeout_s)
    return process.returncode, said


def children(pid: int) -> list[int]:
    """Processes started by ``pid``, in order."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return sorted(found)

"""Random kills, stopped ranks and full disks against one run that is started again each time, held against an undisturbed run.

A life is one start of the run until all its processes are gone. What is counted:

* hangs: processes that are still there ``HANG_S`` seconds after the attack (or after a SIGTERM);
* lost steps: a checkpoint was finished, and the next life does not continue from it or a later one;
* wrong losses: steps whose loss, norm or counts are not those of the undisturbed run, bit for bit;
* unnamed: a stopped rank that the message does not name.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.training.summary import METRICS_FILE
from tests.endure.forks import Run, Zygote
from tests.endure.torchrun import Torchrun
from tests.training.real_run import numbers

HANG_S = 60.0
TIMEOUT_MINUTES = 0.2
PATIENT = "train.timeout_minutes=30"  # a busy machine may halt a rank for long
SETTINGS = (
    "train.precision=fp32", "model.llm.num_layers=2", "train.global_batch_size=2", "checkpoint.save_every=2",
    "parallel.ulysses=2", f"train.timeout_minutes={TIMEOUT_MINUTES}",
)  # fmt: skip
"""of a run whose ranks do a step in milliseconds"""
KINDS = ("rank killed", "all killed", "launcher killed", "rank stopped", "signal", "disk full")
TOO_LATE = "none: it had ended before"


@dataclass
class Score:
    """What the lives of all runs came to."""

    lives: Counter[str] = field(default_factory=Counter)
    codes: dict[str, Counter[int]] = field(default_factory=dict)
    steps: int = 0
    runs_finished: int = 0
    hangs: list[str] = field(default_factory=list)
    lost_steps: list[str] = field(default_factory=list)
    wrong_losses: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def attacks(self) -> int:
        return self.lives.total() - self.lives[TOO_LATE]

    def add(self, other: Score) -> None:
        self.lives += other.lives
        for kind, codes in other.codes.items():
            self.codes.setdefault(kind, Counter()).update(codes)
        self.steps += other.steps
        self.runs_finished += other.runs_finished
        for name in ("hangs", "lost_steps", "wrong_losses", "unnamed"):
            getattr(self, name).extend(getattr(other, name))

    def faults(self) -> list[str]:
        return [*self.hangs, *self.lost_steps, *self.wrong_losses, *self.unnamed]

    def table(self) -> str:
        rows = ["| attack | lives | exit codes of the launcher |", "|---|---|---|"]
        for kind, count in self.lives.most_common():
            codes = ", ".join(f"{code}: {n}" for code, n in sorted(self.codes[kind].items()))
            rows.append(f"| {kind} | {count} | {codes} |")
        rows += ["", f"{self.attacks()} attacks, {self.runs_finished} runs finished, {self.steps} steps compared"]
        rows.append(
            f"hangs: {len(self.hangs)}; lost steps: {len(self.lost_steps)}; wrong losses: {len(self.wrong_losses)}; "
            f"stopped ranks not named: {len(self.unnamed)}"
        )
        return "\n".join(rows + self.faults())


@dataclass(frozen=True)
class Calm:
    """A run that nobody disturbs: what each step came to, and how long it took from its start to its end."""

    steps: dict[int, tuple]
    life_s: float

    @classmethod
    def run(cls, starter: Zygote | Torchrun, settings: Sequence[str], world: int, folder: Path) -> Calm:
        started_s = time.monotonic()
        run = starter.start(_arguments(settings, folder, PATIENT), world, folder.with_suffix(".log"))
        assert run.ends_within(600) and starter.status(run) == 0, run.log.read_text()
        return cls({step[0]: step for step in numbers(folder)}, time.monotonic() - started_s)


class Attack:
    """Attacks on runs of ``settings`` (without ``train.output``) on ``world`` ranks, with files under ``folder``."""

    def __init__(
        self, starter: Zygote | Torchrun, settings: Sequence[str], world: int, folder: Path, seed: int, calm: Calm
    ) -> None:
        self._starter, self._settings, self._world, self._folder = starter, [*settings], world, folder
        self._random = random.Random(seed)
        self.score = Score()
        self._output, self._number, self._saved = folder / "runs/0", 0, 0
        self._truth, self._life_s = calm.steps, calm.life_s

    def life(self, kind: str) -> None:
        """One start of the run, attacked at a random moment; ``kind`` is one of ``KINDS``."""
        log = self._log(self._output)
        said_before = log.stat().st_size if log.exists() else 0
        run, started_s = self._start(self._output), time.monotonic()
        moment_s = self._random.uniform(0.0, self._life_s)
        while run.alive() and time.monotonic() < started_s + moment_s:
            time.sleep(0.005)
        stopped, self._struck = None, "all"
        if not run.alive():
            kind, self._life_s = TOO_LATE, time.monotonic() - started_s
        with self._disk() if kind == "disk full" else contextlib.nullcontext():
            if kind in KINDS:
                stopped = self._strike(run, kind)
            if not run.ends_within(HANG_S):
                self.score.hangs.append(f"hang after '{kind}' of {self._struck} (run {self._number}): see {run.log}")
                run.kill()
                run.ends_within(HANG_S)
        code = self._starter.status(run)
        self.score.lives[kind] += 1
        self.score.codes.setdefault(kind, Counter())[code] += 1
        said = run.log.read_bytes()[said_before:].decode(errors="replace")
        named = rf"megatron_vila: .*rank {stopped} (\(process|has not come)"
        if stopped is not None and code != 0 and not re.search(named, said):
            self.score.unnamed.append(f"rank {stopped} was stopped and is not named (run {self._number}): see {run.log}")
        self._judge(kind, code, said)

    def finish(self) -> None:
        """Let the run that is in work come to its end."""
        run = self._start(self._output, PATIENT)
        if not run.ends_within(600):
            self.score.hangs.append(f"hang without an attack (run {self._number})")
            run.kill()
        self._judge("none", self._starter.status(run), run.log.read_text())

    def _start(self, output: Path, *more: str) -> Run:
        output.mkdir(parents=True, exist_ok=True)
        return self._starter.start(_arguments(self._settings, output, *more), self._world, self._log(output))

    def _log(self, output: Path) -> Path:
        return self._folder / f"{output.name}.log"

    def _strike(self, run: Run, kind: str) -> int | None:
        """Do it; returns the rank that was stopped."""
        rank = self._random.randrange(self._world)
        self._struck = f"rank {rank} ({run.ranks[rank]})"
        targets = {"rank killed": [run.ranks[rank]], "all killed": run.ranks, "launcher killed": [run.launcher]}
        number = {"rank stopped": signal.SIGSTOP, "signal": signal.SIGTERM}.get(kind, signal.SIGKILL)
        if kind == "disk full":
            return None
        for pid in targets.get(kind, [run.ranks[rank]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return rank if kind == "rank stopped" else None

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """All but some KiB of the file system of the outputs are taken meanwhile; ``small_disk`` makes it small."""
        filler = self._folder / "runs/filler"
        left = self._random.choice([0, self._random.randrange(2**12), self._random.randrange(2**18)])
        with open(filler, "wb") as file:
            for _ in range(100):  # the run writes meanwhile
                free = shutil.disk_usage(filler.parent).free
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, max(1, free - left))
                    break
        try:
            yield
        finally:
            filler.unlink()

    def _judge(self, kind: str, code: int, said: str) -> None:
        found = latest_checkpoint(self._output)
        step = int(found.name.split("-")[1]) if found else 0
        went_on = re.findall(r"continuing from .* after step (\d+)", said)
        if step < self._saved or (went_on and int(went_on[-1]) < self._saved):
            self.score.lost_steps.append(f"run {self._number}: step {self._saved} was saved, then {went_on or step}")
        self._saved = step
        for record in numbers(self._output):
            self.score.steps += 1
            if record != self._truth[record[0]]:
                self.score.wrong_losses.append(f"run {self._number}: {record} instead of {self._truth[record[0]]}")
        if kind == "none" or code == 0:
            if len(numbers(self._output)) != len(self._truth):
                self.score.wrong_losses.append(f"run {self._number}: {METRICS_FILE} has not every step")
            self.score.runs_finished += 1
            shutil.rmtree(self._output)
            self._number += 1
            self._output, self._saved = self._folder / f"runs/{self._number}", 0


def _arguments(settings: Sequence[str], output: Path, *more: str) -> list[str]:
    return ["tiny", *settings, f"train.output={output}", *more]


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """A file system of its own for ``folder``, so that it can be filled; False where this process may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)

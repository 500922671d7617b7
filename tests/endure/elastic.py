"""A run that is killed at random moments and goes on under other layouts, held against one that nobody disturbed.

Checkpoints of every step keep the place among the samples, which tells what each step took from the order: nothing of the
trainer is changed to be watched. The samples are pictures, videos and texts, among them such as cannot be opened, cannot be
decoded or do not fit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_vila.data.order import SampleOrder
from megatron_vila.training.summary import read_metrics
from tests.data.material import conversation, cut_off, destroy_frames
from tests.endure.forks import Zygote
from tests.training.real_run import Layout, numbers, overrides, write_videos

HANG_S = 120.0
ROWS, SEED, LENGTH = 8, 1234, 64
LAYOUTS = (
    Layout(), Layout(2), Layout(4), Layout(8), Layout(2, tp=2), Layout(4, ulysses=2), Layout(8, tp=2), Layout(4, ring=2),
    Layout(8, tp=2, ulysses=2), Layout(2, pp=2),
)  # fmt: skip
SETTINGS = (
    f"train.global_batch_size={ROWS}", f"train.seed={SEED}", f"train.seq_length={LENGTH}", "model.llm.num_layers=2",
    "checkpoint.save_every=1", "checkpoint.keep=0", "data.max_broken=1", "train.timeout_minutes=30",
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Two files of samples; ``usable`` are the numbers of the records that can be used."""

    folder: Path
    files: tuple[Path, Path]
    sizes: tuple[int, int]
    usable: frozenset[int]

    @classmethod
    def write(cls, folder: Path) -> Samples:
        videos = write_videos(folder)
        records = [r for name in ("3", "6", "image") for r in json.loads((videos / f"train_{name}.json").read_text())]
        (videos / records[1]["video"]).write_bytes(b"")
        cut_off(videos / records[6]["video"])
        for place in (3, 9, 12):
            destroy_frames(videos / records[place]["video"], 1, 2)
        records += [{"id": f"text {n}", "conversations": conversation("x " * n, "y")} for n in range(1, 12)]
        records += [{"id": f"too long {n}", "conversations": conversation("word " * 200, "y")} for n in range(3)]
        unusable = {1, 3, 6, 9, 12, *range(len(records) - 3, len(records))}
        half = len(records) // 2
        files = folder / "first.json", folder / "second.json"
        for file, part in zip(files, (records[:half], records[half:]), strict=True):
            file.write_text(json.dumps(part))
        return cls(folder, files, (half, len(records) - half), frozenset(range(len(records))) - unusable)


@dataclass
class Elastic:
    """One run over ``samples``, with packing or without, blended by weights or not, of ``steps`` steps."""

    zygote: Zygote
    samples: Samples
    folder: Path
    steps: int
    packing: bool
    weights: tuple[float, ...] = ()
    kills: Counter[str] = field(default_factory=Counter)

    def settings(self, output: Path, layout: Layout) -> list[str]:
        return [
            "tiny",
            *overrides(self.samples.folder, output, *SETTINGS, f"train.steps={self.steps}", *layout.overrides()),
            f"data.train=[{','.join(map(str, self.samples.files))}]",
            f"data.packing={str(self.packing).lower()}",
            f"data.weights=[{','.join(map(str, self.weights))}]",
        ]

    def calm(self) -> Path:
        """The folder of a run of one process that nobody disturbs."""
        output = self.folder / "calm"
        self._end(self.zygote.start(self.settings(output, LAYOUTS[0]), 1, self.folder / "calm.log"), 0)
        return output

    def attacked(self, kills: int, seed: int, layouts: tuple[Layout, ...] = LAYOUTS) -> Path:
        """The folder of a run that is killed ``kills`` times, each time as a whole or one rank of it, and then left to its end.

        Every start has another layout.
        """
        output, choose, layout = self.folder / "attacked", random.Random(seed), layouts[0]
        life = 0
        while self.kills.total() < kills:
            life += 1
            layout = choose.choice([other for other in layouts if other != layout])
            before = len(_checkpoints(output))
            if before >= self.steps - 1:
                raise AssertionError(f"the run ended after {self.kills.total()} kills; give it more steps")
            run = self.zygote.start(self.settings(output, layout), layout.world, self.folder / f"{life}.log")
            try:
                # At any moment: while it starts, or some steps later.
                until = choose.choice([before, before, before + choose.randrange(1, 4)])
                while run.alive() and len(_checkpoints(output)) < min(until, self.steps - 1):
                    time.sleep(0.005)
                time.sleep(choose.random() * (2.0 if until == before else 0.2))
                if choose.random() < 0.5 and layout.world > 1:
                    os.kill(choose.choice(run.ranks), signal.SIGKILL)
                    kind = "one rank"
                else:
                    kind = "all ranks"
                    run.kill()
                assert run.ends_within(HANG_S), run.log.read_text()
            except ProcessLookupError:
                continue
            finally:
                run.kill()
            self.kills[f"{kind}, {layout}"] += 1
        layout = choose.choice([other for other in layouts if other != layout])
        self._end(self.zygote.start(self.settings(output, layout), layout.world, self.folder / "last.log"), 0)
        return output

    def _end(self, run, status: int) -> None:
        try:
            assert run.ends_within(HANG_S), run.log.read_text()
            assert self.zygote.status(run) == status, run.log.read_text()
        finally:
            run.kill()

    def taken(self, output: Path) -> list[frozenset[int]]:
        """The instances that each step took from the order, those left out included."""
        places = [{"following": 0, "waiting": []}]
        places += [_place(output, step) for step in range(1, self.steps + 1)]
        return [
            frozenset([*before["waiting"], *range(before["following"], after["following"])]) - frozenset(after["waiting"])
            for before, after in zip(places[:-1], places[1:], strict=True)
        ]

    def check(self, calm: Path, attacked: Path) -> None:
        """Raise ``AssertionError`` if the attacked run is not the calm one, or either is not what was promised."""
        assert [_place(attacked, step) for step in range(1, self.steps + 1)] == [
            _place(calm, step) for step in range(1, self.steps + 1)
        ], "the place among the samples is not the same after every step"
        for mine, other in zip(numbers(attacked), numbers(calm), strict=True):
            assert np.allclose(mine, other, rtol=1e-9, atol=0), (mine, other)
        counts = ("drawn", "left_out_broken", "left_out_too_long", "truncated", "unsupervised")
        kept = [[[record[name] for name in counts] for record in read_metrics(output)[0]] for output in (attacked, calm)]
        assert kept[0] == kept[1]
        taken = self.taken(attacked)
        seen = [n for step in taken for n in sorted(step)]
        assert len(seen) == len(set(seen)), "a sample came twice"
        last = _place(attacked, self.steps)
        assert sorted([*seen, *last["waiting"]]) == list(range(last["following"])), "a sample did not come"
        self._check_epochs(set(seen))

    def _check_epochs(self, seen: set[int]) -> None:
        """In each epoch of each source that is over, every record was taken once."""
        sizes = self.samples.sizes if self.weights else (sum(self.samples.sizes),)
        order = SampleOrder(sizes, SEED, True, self.weights)
        sources, numbers = order.locate(0, max(seen) + 1)
        records = order.records(0, max(seen) + 1)
        starts = np.cumsum([0, *sizes])
        for source, size in enumerate(sizes):
            mine = np.flatnonzero(sources == source)
            for epoch in range(len(mine) // size):
                of_epoch = mine[numbers[mine] // size == epoch]
                if len(of_epoch) == size and seen.issuperset(of_epoch.tolist()):
                    assert sorted(records[of_epoch]) == list(range(starts[source], starts[source] + size))


def _checkpoints(output: Path) -> list[Path]:
    return list((output / "checkpoints").glob("step-[0-9]*"))


def _place(output: Path, step: int) -> dict:
    (folder,) = (output / "checkpoints").glob(f"step-{step:08d}*")
    return torch.load(folder / "state.pt", weights_only=True)["extra"]["stream"]

"""Attack a small run again and again: killed ranks, killed launchers, stopped ranks, signals, full disks. It is started again
each time, and held against a run that nobody disturbed. Prints a table; ends with status 1 if a run hung, lost a saved step,
computed another loss, or did not name a rank that stood still.

python tools/endure.py --attacks 300 --minutes 20
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.endure.attack import KINDS, SETTINGS, Attack, Calm, Score, small_disk
from tests.endure.forks import Zygote
from tests.endure.torchrun import Torchrun
from tests.training.real_run import overrides, write_videos

WORLD = 2
STEPS = 24


class Campaign:
    """What is attacked and what it came to; ``lives`` may run in several threads."""

    def __init__(self, starter: Zygote | Torchrun, settings: list[str], folder: Path, end_s: float, calm: Calm) -> None:
        self._starter, self._settings, self._folder, self._end_s, self._calm = starter, settings, folder, end_s, calm
        self._lock, self.score = threading.Lock(), Score()

    def lives(self, count: int, seed: int, done: Callable[[int], None]) -> None:
        """Attack ``count`` lives of one run after the other (fewer if the time ends); calls ``done`` after each."""
        folder, choose = self._folder / str(seed), random.Random(seed)
        with small_disk(folder / "runs", 64) as has_disk:
            attack = Attack(self._starter, self._settings, WORLD, folder, seed, self._calm)
            kinds = KINDS if has_disk else KINDS[:-1]
            try:
                while attack.score.attacks() < count and time.monotonic() < self._end_s:
                    before = attack.score.attacks()
                    attack.life(choose.choice(kinds))
                    done(attack.score.attacks() - before)
                attack.finish()
            finally:
                with self._lock:
                    self.score.add(attack.score)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", type=int, default=300, help="on runs whose ranks are forked from one warm process")
    parser.add_argument("--torchrun", type=int, default=5, help="attacks on runs that torchrun starts, which takes far longer")
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no attack after this time")
    parser.add_argument("--at-once", type=int, default=4, help="forked runs at a time; stopped ranks mostly wait")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs, which is named at the end")
    args = parser.parse_args()
    folder, started_s = Path(tempfile.mkdtemp(prefix="endure-")), time.monotonic()
    settings = overrides(write_videos(folder / "videos"), folder, f"train.steps={STEPS}", *SETTINGS)
    print(f"logs: {folder}", flush=True)
    with Zygote() as zygote:
        calm = Calm.run(zygote, settings, WORLD, folder / "calm")
        starters = {"forked ranks": (zygote, args.attacks, args.at_once), "torchrun": (Torchrun(), args.torchrun, 1)}
        scores = {}
        for name, (starter, attacks, at_once) in starters.items():
            if not attacks:
                continue
            if name == "torchrun":
                of_torchrun = Calm.run(starter, settings, WORLD, folder / "calm-torchrun")
                assert of_torchrun.steps == calm.steps, "torchrun's ranks and forked ones do not agree"
                calm = of_torchrun
            campaign = Campaign(starter, settings, folder / name.replace(" ", "-"), started_s + args.minutes * 60, calm)
            scores[name] = attacked(campaign, name, attacks, at_once, args.seed)
    for name, score in scores.items():
        print(f"\n{name}, {WORLD} ranks, {(time.monotonic() - started_s) / 60:.1f} minutes in all:\n\n{score.table()}")
    faults = [fault for score in scores.values() for fault in score.faults()]
    if not faults and not args.keep:
        shutil.rmtree(folder)
    return bool(faults)


def attacked(campaign: Campaign, name: str, count: int, at_once: int, seed: int) -> Score:
    """Attack ``count`` lives, ``at_once`` at a time."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shares = [count // at_once + (place < count % at_once) for place in range(at_once)]
    with Progress(*columns) as progress, ThreadPoolExecutor(at_once) as pool:
        bar = progress.add_task(name, total=count)
        running = [
            pool.submit(campaign.lives, share, 1000 * seed + place, lambda more: progress.advance(bar, more))
            for place, share in enumerate(shares)
        ]
        for error in filter(None, [one.exception() for one in running]):
            campaign.score.hangs.append(f"this program failed: {type(error).__name__}: {error}")
    return campaign.score


if __name__ == "__main__":
    sys.exit(main())

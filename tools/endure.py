"""Attack a small run again and again: killed ranks, killed launchers, stopped ranks, signals, full disks. It is started again
each time, and held against a run that nobody disturbed. Prints a table; ends with status 1 if a run hung, lost a saved step,
computed another loss, or did not name a rank that stood still.

python tools/endure.py --attacks 300 --minutes 15
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.progress import Progress

from tests.endure.attack import KINDS, TIMEOUT_MINUTES, Attack, small_disk
from tests.endure.forks import Zygote
from tests.endure.torchrun import Torchrun
from tests.training.real_run import overrides, write_videos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", type=int, default=300, help="on runs whose ranks are forked from one warm process")
    parser.add_argument("--torchrun", type=int, default=5, help="attacks on runs that torchrun starts, which takes far longer")
    parser.add_argument("--minutes", type=float, default=15.0, help="end after this time at the latest")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs, which is named at the end")
    args = parser.parse_args()
    folder, end = Path(tempfile.mkdtemp(prefix="endure-")), time.monotonic() + args.minutes * 60
    settings = overrides(
        write_videos(folder / "videos"), folder, "train.precision=fp32", "train.steps=40", "checkpoint.save_every=2",
        "model.llm.num_layers=2", f"train.timeout_minutes={TIMEOUT_MINUTES}", f"parallel.ulysses={args.world}",
    )  # fmt: skip
    faults = []
    if args.torchrun:
        faults += attacked(Torchrun(), "torchrun", args.torchrun, settings, args, folder / "torchrun", end)
    with Zygote() as zygote:
        faults += attacked(zygote, "forked ranks", args.attacks, settings, args, folder / "forked", end)
    if faults or args.keep:
        print(f"logs: {folder}")
    else:
        shutil.rmtree(folder)
    return bool(faults)


def attacked(
    starter: Zygote | Torchrun, name: str, count: int, settings: list[str], args: argparse.Namespace, folder: Path, end: float
) -> list[str]:
    """Attack ``count`` lives (fewer if the time ends), print the table, and return what went wrong."""
    choose = random.Random(args.seed)
    with small_disk(folder / "runs", 64) as has_disk, Progress() as progress:
        attack = Attack(starter, settings, args.world, folder, args.seed)
        kinds = KINDS if has_disk else KINDS[:-1]
        bar = progress.add_task(name, total=count)
        while attack.score.attacks() < count and time.monotonic() < end:
            attack.life(choose.choice(kinds))
            progress.update(bar, completed=attack.score.attacks())
        attack.finish()
    print(f"\n{name}, {args.world} ranks:\n\n{attack.score.table()}")
    return attack.score.faults()


if __name__ == "__main__":
    sys.exit(main())

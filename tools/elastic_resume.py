"""Kill a run at random moments and go on under another dp, cp, tp or pp each time; hold it against a run that nobody disturbed:
the samples of every step, the multiset of every epoch, losses, norms and counts. Samples that are empty, cut off, undecodable or
too long are among them. Ends with status 1 at the first difference.

python tools/elastic_resume.py --kills 20
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.endure.elastic import Elastic, Samples
from tests.endure.forks import Zygote

CASES = {"one sample a row": (False, ()), "packed": (True, ()), "packed blend": (True, (0.3, 0.7))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of moments and layouts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", action="store_true", help="keep the folder, which is named at the start")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    print(f"logs: {folder}", flush=True)
    samples = Samples.write(folder / "data")
    with Zygote() as zygote:
        for name in args.cases:
            packing, weights = CASES[name]
            started_s = time.monotonic()
            run = Elastic(zygote, samples, folder / name.replace(" ", "-"), args.steps, packing, weights)
            run.folder.mkdir()
            calm, attacked = run.calm(), run.attacked(args.kills, args.seed)
            run.check(calm, attacked)
            taken = sum(map(len, run.taken(attacked)))
            print(
                f"{name}: {run.kills.total()} kills, {args.steps} steps, {taken} samples taken: exact "
                f"({(time.monotonic() - started_s) / 60:.1f} minutes)",
                flush=True,
            )
            for kind, count in sorted(run.kills.items()):
                print(f"  {count} x {kind}")
    if not args.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sum up runs that follow one another (the stages of a recipe): one summary.json, one loss curve and a table on the screen.

python tools/summarize_runs.py runs/quickstart runs/quickstart/stage_1 runs/quickstart/stage_2 --wall-s 300
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.errors import entry_point
from megatron_vila.training.summary import SUMMARY_FILE, combine, print_summary, write_json


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for summary.json and loss.png")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs, in order")
    parser.add_argument("--labels", nargs="+", help="a name for each run (default: its folder's)")
    parser.add_argument("--wall-s", type=float, required=True, help="wall time of all runs together in seconds")
    args = parser.parse_args()
    labels = args.labels or [run.name for run in args.runs]
    if len(labels) != len(args.runs):
        parser.error(f"{len(labels)} labels for {len(args.runs)} runs; give one for each")
    summary = combine(args.runs, args.wall_s)
    # Imported late: --help needs no matplotlib.
    from megatron_vila.training.plots import plot_runs

    write_json(args.out / SUMMARY_FILE, summary)
    plot_runs(args.runs, args.out / "loss.png", labels)
    print_summary(summary, labels, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())

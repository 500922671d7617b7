"""Measure variants side by side and write a CSV table.

Example: python tools/benchmark.py step examples/benchmarks/longvila-7b-4layers-32k.yaml --gpus 2 \
    --variant parallel.ulysses=2,model.attention=fa4 --variant parallel.ring=2,model.attention=fa4 \
    --out docs/benchmarks/step.csv
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from megatron_vila.benchmark.step import run_variant, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    step = kinds.add_parser("step", help="whole training steps by the trainer")
    step.add_argument("config", help="YAML file or preset")
    step.add_argument("overrides", nargs="*", help="overrides of all variants")
    step.add_argument("--gpus", type=int, required=True, help="processes")
    step.add_argument("--variant", action="append", required=True, help="overrides of one variant, joined by commas")
    step.add_argument("--warmup", type=int, default=10, help="steps before the timed ones")
    step.add_argument("--timed", type=int, default=5, help="timed steps")
    step.add_argument("--out", type=Path, required=True, help="CSV file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, variant in enumerate(options.variant):
            folder = Path(scratch) / str(number)
            try:
                row = run_variant(
                    options.config, options.overrides, variant, options.gpus, options.warmup, options.timed, folder
                )
            except RuntimeError as error:
                # One variant that does not fit or run must not cost the others' results.
                print(error, flush=True)
                continue
            rows.append(row)
            shown = ("variant", "time_s", "tokens_per_s_per_gpu", "mfu", "peak_gib", "first_loss")
            print({key: row[key] for key in shown}, flush=True)
            write_table(rows, options.out)


if __name__ == "__main__":
    main()

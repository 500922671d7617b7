"""Plant faults in the parallel layer, one at a time, and show that the test suite fails for each.

Works on a copy of the repository. Prints a table and exits with 1 if a fault goes unnoticed, or if the tests fail without one.

Example: python tools/seeded_faults.py --out docs/seeded_faults.md
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import FAULTS
from faults.fault import EVERY_LAYOUT

REPO = Path(__file__).resolve().parents[1]


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether these tests pass in ``folder``, and the first line that says what failed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run:\n{done.stdout}{done.stderr}")
    failed = [line.split(" - ")[0].split("::")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 0, failed[0] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table (Markdown) to this file")
    parser.add_argument("--only", default="", help="plant only faults whose name holds this text")
    options = parser.parse_args()
    rows, unnoticed = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        for part in ("megatron_vila", "tests"):
            shutil.copytree(REPO / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        passed, failed = run_tests(copy, EVERY_LAYOUT)
        if not passed:
            print(f"the tests fail without a fault: {failed}")
            return 1
        for fault in (fault for fault in FAULTS if options.only in fault.name):
            path = copy / fault.file
            original = path.read_text()
            if original.count(fault.old) != 1:
                raise ValueError(
                    f"fault '{fault.name}': its text stands {original.count(fault.old)} times in {fault.file}"
                )
            path.write_text(original.replace(fault.old, fault.new))
            passed, failed = run_tests(copy, fault.tests)
            path.write_text(original)
            unnoticed += passed
            rows.append(f"| {fault.name} | `{fault.file}` | {'**not noticed**' if passed else failed} |")
            print(rows[-1], flush=True)
    table = ["| fault | file | first test that fails |", "|---|---|---|", *rows]
    if options.out:
        options.out.write_text("\n".join(table) + "\n")
    print(f"{len(rows) - unnoticed} of {len(rows)} faults noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Plant faults in the package, one at a time, and show that the test suite fails for each.

Works on a copy of the repository. Prints a table and exits with 1 if a fault goes unnoticed, or if the tests fail without one.
The libraries are imported once: each run of the tests is a fork, whose ranks are forks again.

Example: python tools/seeded_faults.py --out docs/seeded_faults.md
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from faults import FAULTS
from faults.fault import Fault

REPO = Path(__file__).resolve().parents[1]
OURS = ("megatron_vila", "tests", "tools", "benchmarks")
LIBRARIES_OF = ("megatron_vila.training.trainer", "megatron_vila.convert.exporter", "megatron_vila.convert.importer")


def import_libraries(folder: Path) -> None:
    """Import what the tests need of other packages, by way of the project's modules, which are forgotten again."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.import_module("megatron_vila.accelerator").prepare()
    for name in (*LIBRARIES_OF, "pytest", "torch.utils.tensorboard", "matplotlib.pyplot"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether these tests pass in ``folder``, and the first line that says what failed."""
    log = folder.parent / "log.txt"
    process = os.fork()
    if not process:
        _be_pytest(folder, tests, log)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    said = log.read_text(errors="replace")
    if code not in (0, 1):
        raise RuntimeError(f"pytest could not run:\n{said}")
    failed = [line.split(" - ")[0].split("::")[-1] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return code == 0, failed[0] if failed else ""


def _be_pytest(folder: Path, tests: tuple[str, ...], log: Path) -> None:
    """Never returns."""
    code = 3
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(folder), "MEGATRON_VILA_TEST_RANKS": "fork"}
        code = sys.modules["pytest"].main(["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *tests])
    finally:
        sys.stdout.flush()
        os._exit(code)


def planted(folder: Path, fault: Fault) -> tuple[bool, str]:
    """``run_tests`` with the fault in its file. Raises ``ValueError`` if its text does not stand there exactly once."""
    path = folder / fault.file
    original = path.read_text()
    if original.count(fault.old) != 1:
        raise ValueError(f"fault '{fault.name}': its text stands {original.count(fault.old)} times in {fault.file}")
    path.write_text(original.replace(fault.old, fault.new))
    try:
        return run_tests(folder, fault.tests)
    finally:
        path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table (Markdown) to this file")
    parser.add_argument("--only", action="append", help="plant only faults whose name or file holds this text (may be repeated)")
    parser.add_argument("--part", default="1/1", help="plant a part of these: 2/3 is the second third")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    wanted = options.only or [""]
    faults = [fault for fault in FAULTS if any(text in f"{fault.name} {fault.file}" for text in wanted)]
    faults = faults[len(faults) * (part - 1) // parts : len(faults) * part // parts]
    rows, unnoticed, failing = [], 0, set()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        for folder in OURS:
            shutil.copytree(REPO / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "pyproject.toml", copy)
        import_libraries(copy)
        for tests in dict.fromkeys(fault.tests for fault in faults):
            passed, failed = run_tests(copy, tests)
            if not passed:
                print(f"the tests {' '.join(tests)} fail without a fault, their faults are not planted: {failed}", flush=True)
                failing.add(tests)
        for fault in [fault for fault in faults if fault.tests not in failing]:
            passed, failed = planted(copy, fault)
            unnoticed += passed
            rows.append(f"| {fault.name} | `{fault.file}` | {'**not noticed**' if passed else failed} |")
            print(rows[-1], flush=True)
    table = ["| fault | file | first test that fails |", "|---|---|---|", *rows]
    if options.out:
        options.out.write_text("\n".join(table) + "\n")
    print(f"{len(rows) - unnoticed} of {len(rows)} planted faults noticed, {len(faults) - len(rows)} not planted")
    return int(unnoticed > 0 or bool(failing))


if __name__ == "__main__":
    sys.exit(main())

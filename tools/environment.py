"""The environment of this Python: what it lacks, which versions it keeps, and installation with a bar.

    python tools/environment.py missing gpu                         # what setup.py asks for and is not there
    python tools/environment.py pins constraints.txt > merged.txt   # pins, but for what is installed: that stays as it is
    python tools/environment.py install constraints.txt test,gpu    # this checkout with these extras
    python tools/environment.py check                               # import what the package needs

A container's own torch, Transformer Engine or apex must not be replaced by a pinned version: ``pins`` prints each pin of a
package that is installed with the installed version. Nothing is imported here but Python's own modules and pip's.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
CHECK = "import torch, megatron.core, transformers, av"
LOG_INTERVAL_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="missing, pins, install or check")
    command = commands.add_parser("missing", help="print what setup.py requires and is not met; exit status 1 if anything")
    command.add_argument("extras", nargs="*", help="extras that are wanted too")
    command.set_defaults(run=lambda options: print_missing(options.extras))
    command = commands.add_parser("pins", help="print the pins with installed versions put in")
    command.add_argument("constraints", type=Path, help="file with one name==version in a line")
    command.set_defaults(run=lambda options: print_pins(options.constraints))
    command = commands.add_parser("install", help="run pip for this checkout, with a bar")
    command.add_argument("constraints", type=Path, help="pip's constraints file")
    command.add_argument("extras", help="extras, joined by commas")
    command.set_defaults(run=lambda options: install(options.constraints, options.extras))
    command = commands.add_parser("check", help="import torch, Megatron-Core and transformers once")
    command.set_defaults(run=lambda options: first_import())
    options = parser.parse_args()
    return options.run(options)


def print_missing(extras: list[str]) -> int:
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement

    base, optional = requirements()
    missing = []
    for text in base + [text for extra in extras for text in optional[extra]]:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = wanted.specifier.contains(version(wanted.name), prereleases=True)
        except PackageNotFoundError:
            found = False
        if not found:
            missing.append(text)
    print(*missing, sep="\n", end="\n" * bool(missing))
    return int(bool(missing))


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What setup.py requires, and its extras, read without running it."""
    tree = ast.parse((REPO / "setup.py").read_text(encoding="utf-8"))
    base = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "REQUIRED")
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup")
    extras = next(keyword.value for keyword in call.keywords if keyword.arg == "extras_require")
    return ast.literal_eval(base), ast.literal_eval(extras)


def print_pins(constraints: Path) -> int:
    for name, pinned in read_pins(constraints):
        try:
            print(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(f"{name}=={pinned}")
    return 0


def read_pins(constraints: Path) -> list[tuple[str, str]]:
    lines = [line.split("#")[0].strip().partition("==") for line in constraints.read_text(encoding="utf-8").splitlines()]
    return [(name, pinned) for name, separator, pinned in lines if separator]


def install(constraints: Path, extras: str) -> int:
    pip = [sys.executable, "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "-c", str(constraints)]
    packages = Packages(len(read_pins(constraints)))
    return follow([*pip, "-e", f"{REPO}[{extras}]"], packages.read, packages.describe)


def first_import() -> int:
    """Import what takes longest: whether it works, and compiled for all later imports."""
    return follow([sys.executable, "-W", "ignore", "-c", CHECK], lambda text: None, lambda: "first import")


class Packages:
    """How far pip is, from what it says: packages found first, then packages installed."""

    def __init__(self, expected: int) -> None:
        self._expected, self._found, self._what = max(expected, 1), 0, ""
        self._waiting: set[str] = set()

    def read(self, text: str) -> None:
        """Take in a line of pip's output."""
        name = r"(?:\S*/)?(\w[\w.]*(?:-[A-Za-z][\w.]*)*)"
        if found := re.match(rf"\s*(?:Collecting|Processing|Requirement already satisfied:) {name}", text):
            self._found, self._what = self._found + 1, found[1]
        elif found := re.match(r"\s*Downloading (\S+?)-\d\S* \((.+)\)", text):
            self._what = f"{found[1].rpartition('/')[2]}, {found[2]}"
        elif text.startswith("Installing collected packages:"):
            self._waiting = {normal(name) for name in text.partition(":")[2].split(",")}

    def describe(self) -> str:
        """A bar with what it counts."""
        if not self._waiting:
            return f"{bar(self._found, self._expected)} {self._found} packages found: {self._what}"
        place = [sysconfig.get_path("purelib")]
        done = self._waiting & {normal(found.name or "") for found in distributions(path=place)}
        return f"{bar(len(done), len(self._waiting))} {len(done)} of {len(self._waiting)} packages installed"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def bar(done: int, total: int, width: int = 24) -> str:
    full = width * min(done, total) // total
    return "[" + "#" * full + "." * (width - full) + "]"


def follow(command: list[str], read: Callable[[str], None], describe: Callable[[], str]) -> int:
    """Run ``command`` and show ``describe()`` with the time; ``read`` gets each line of its output. Returns its exit status.

    On a terminal one line is written again and again, elsewhere a new one every ``LOG_INTERVAL_S`` seconds. The output of a
    command that fails is shown.
    """
    moves, started_s, said_s = sys.stdout.isatty(), time.monotonic(), 0.0
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    output: list[str] = []

    def take() -> None:
        for text in job.stdout:
            output.append(text)
            read(text)

    reader = threading.Thread(target=take, daemon=True)
    reader.start()
    try:
        while job.poll() is None:
            passed_s = time.monotonic() - started_s
            if moves:
                text = f"{describe()} ({passed_s:.0f} s)"
                print("\r" + text[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="", flush=True)
            elif passed_s - said_s >= LOG_INTERVAL_S:
                said_s = passed_s
                print(f"{describe()} ({passed_s:.0f} s)", flush=True)
            time.sleep(0.2)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()
        if moves:
            print("\r\x1b[K", end="", flush=True)
    reader.join()
    if job.returncode:
        print("".join(output), file=sys.stderr)
    return job.returncode


if __name__ == "__main__":
    sys.exit(main())

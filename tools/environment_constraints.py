"""Print constraints for an environment that already holds packages: those stay as they are, the rest is pinned.

    python tools/environment_constraints.py constraints.txt > merged.txt

A container's own torch, Transformer Engine or apex must not be replaced by a pinned version: each pin of a package that is
installed is printed with the installed version.
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constraints", type=Path, help="file with one name==version in a line")
    for line in parser.parse_args().constraints.read_text().splitlines():
        name, separator, pinned = line.partition("==")
        if not separator:
            continue
        try:
            print(f"{name}=={version(name)}")
        except PackageNotFoundError:
            print(f"{name}=={pinned}")


if __name__ == "__main__":
    main()

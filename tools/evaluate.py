"""Measure what a trained model can do: docs/evaluation.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a fault is, and the groups of tests that most of them are left to."""

from __future__ import annotations

from typing import NamedTuple

CONTRACT = "tests/parallel/test_gradient_contract.py"
LAYOUTS = "world4-tp2-pp1-u2-r1 or world4-tp1-pp1-u2-r2 or world4-tp1-pp1-u1-r4 or world4-tp2-pp1-u1-r1"
EVERY_LAYOUT = (CONTRACT, "-k", LAYOUTS)
TRUTH = "tests/training/test_independent_truth.py"
EVENTS = "tests/training/test_independent_events.py"
QWEN2, LLAMA, LEGACY, RING = ((TRUTH, "-k", f"stock_modules and {case}") for case in ("qwen2", "pad", "fps", "ring"))
FRESH = (TRUTH, "-k", "fresh")
POLICIES = (CONTRACT, "-k", "memory_policy and tp2-pp1-u2-r1")


class Fault(NamedTuple):
    """``old`` stands exactly once in ``file`` and becomes ``new``; ``tests`` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = EVERY_LAYOUT

"""The longest row that trains: doubling until it fails, then halving the gap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_vila.benchmark.worker import launch


def longest(fits: Callable[[int], bool], start: int, unit: int, most: int, share: float = 0.0) -> int:
    """The largest multiple of ``unit`` up to ``most`` for which ``fits``; 0 if not even ``unit`` does.

    ``fits`` is tried at ``start`` first and assumed to hold below every length where it holds. The search ends once what is
    open is no more than ``share`` of the result.
    """
    good, bad = 0, most // unit + 1
    trial = min(max(start // unit, 1), bad - 1)
    while bad - good > max(1, int(good * share)):
        if fits(trial * unit):
            good = trial
            trial = min(2 * trial, bad - 1) if bad > most // unit else (good + bad) // 2
        else:
            bad = trial
            trial = (good + bad) // 2
        trial = max(trial, good + 1)
    return good * unit


def search(
    config: str,
    overrides: Sequence[str],
    gpus: int,
    start: int,
    unit: int,
    most: int,
    per_frame: int,
    supervised: int,
    limit_s: float,
    command: str,
) -> list[dict[str, Any]]:
    """Rows of all lengths that trained, the longest last, each a job of its own with two steps.

    ``per_frame`` tokens make a frame of the row's video; 0 for text alone. A length that fails or takes longer than ``limit_s``
    counts as too long; why is printed.
    """
    found: dict[int, dict[str, Any]] = {}

    def fits(length: int) -> bool:
        settings = {
            "config": config,
            "overrides": [*overrides, f"train.seq_length={length}"],
            "frames": length // per_frame * 15 // 16 if per_frame else 0,
            "supervised": supervised,
            "steps": 2,
            "command": command,
        }
        try:
            (row,) = launch("trial", gpus, settings, limit_s)
        except (RuntimeError, ValueError) as error:
            print(f"{length} tokens do not train: {_reason(str(error))}", flush=True)
            return False
        found[length] = row
        print(f"{length} tokens train: {row['time_s']} s a step, {row['peak_gib']} GiB", flush=True)
        return True

    longest(fits, start, unit, most)
    return [found[length] for length in sorted(found)]


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "stopped after" in line]
    return lines[-1] if lines else text.splitlines()[-1]

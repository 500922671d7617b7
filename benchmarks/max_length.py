"""The longest row that trains: away from the first length in steps that grow, then halving what is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.worker import launch


def longest(fits: Callable[[int], bool], start: int, unit: int, most: int, share: float = 0.0) -> int:
    """The largest multiple of ``unit`` up to ``most`` for which ``fits``; 0 if not even ``unit`` does.

    ``fits`` is tried at ``start`` first and assumed to hold below every length where it holds. The search ends once what is open
    is no more than ``share`` of the result. The first step is that share of ``start`` or one unit, each next one four times as
    long: few trials from a start that the memory estimate proposes, and hardly more than by doubling from any other.
    """
    good, bad = 0, most // unit + 1
    trial = min(max(start // unit, 1), bad - 1)
    step = max(1, int(trial * share))
    while bad - good > max(1, int(good * share)):
        if fits(trial * unit):
            good = trial
        else:
            bad = trial
        if good and bad <= most // unit:
            trial = (good + bad) // 2
        else:
            trial = min(good + step, bad - 1) if good else max(bad - step, 1)
            step *= 4
    return good * unit


def trains(
    gpus: int, settings: dict[str, Any], limit_s: float, on_row: Callable[[dict[str, Any]], None]
) -> Callable[[int], bool]:
    """Whether rows of a length (tokens) train, as ``longest`` asks: each length is a job of its own (``benchmarks/trial.py``,
    ``settings`` less the lengths), whose row goes to ``on_row``. One that fails or takes longer than ``limit_s`` does not; why is
    printed."""

    def fits(length: int) -> bool:
        try:
            launch("trial", gpus, settings | {"lengths": [length]}, limit_s, on_row)
        except (RuntimeError, ValueError) as error:
            print(f"{length} tokens do not train: {str(error).splitlines()[-1]}", flush=True)
            return False
        return True

    return fits

"""The longest row that trains: away from the first length in steps that double, then halving what is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_vila.benchmark.worker import launch


def longest(fits: Callable[[int], bool], start: int, unit: int, most: int, share: float = 0.0) -> int:
    """The largest multiple of ``unit`` up to ``most`` for which ``fits``; 0 if not even ``unit`` does.

    ``fits`` is tried at ``start`` first, so that a length which the memory estimate proposes takes few trials, and assumed to
    hold below every length where it holds. The search ends once what is open is no more than ``share`` of the result.
    """
    good, bad = 0, most // unit + 1
    trial, step = min(max(start // unit, 1), bad - 1), 1
    while bad - good > max(1, int(good * share)):
        if fits(trial * unit):
            good = trial
        else:
            bad = trial
        if good and bad <= most // unit:
            trial = (good + bad) // 2
        else:
            trial = min(good + step, bad - 1) if good else max(bad - step, 1)
            step *= 2
    return good * unit


def search(
    gpus: int,
    settings: dict[str, Any],
    start: int,
    unit: int,
    most: int,
    share: float,
    limit_s: float,
    on_row: Callable[[dict[str, Any]], None],
) -> int:
    """The longest row that trains, in tokens; each length is a job of its own (``benchmark/trial.py``, ``settings`` less the
    lengths), whose row goes to ``on_row``. The search ends once what is open is no more than ``share`` of the result.

    A length that fails or takes longer than ``limit_s`` counts as too long; why is printed.
    """

    def fits(length: int) -> bool:
        try:
            launch("trial", gpus, settings | {"lengths": [length]}, limit_s, on_row)
        except (RuntimeError, ValueError) as error:
            print(f"{length} tokens do not train: {str(error).splitlines()[-1]}", flush=True)
            return False
        return True

    return longest(fits, start, unit, most, share)


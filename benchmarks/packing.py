"""How full packed rows are, and how equal the replicas: no GPU, no file of media, the trainer's own stream on made-up lengths.

    python -m benchmarks.packing --out docs/benchmarks/packing.csv

Samples come in the order of a blend by weights. ``packer`` is best_fit, the trainer's, or first_fit: each sample, oldest first,
goes to the first row with room, and rows go to the replicas in turn. Useful tokens are those of samples over rows x seq_len.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.table import hardware
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.data.cards import FIELDS, USABLE, Cards
from megatron_vila.data.order import SampleOrder
from megatron_vila.data.stream import StepPlan, Stream, StreamState
from megatron_vila.errors import entry_point
from megatron_vila.plan.dealing import deal_rows, spread
from megatron_vila.plan.flops import flop_prices
from megatron_vila.plan.pictures import most_frames, pictures_of, row_vision

PRESET, REPLICAS, STEPS, WINDOW = "longvila-7b-stage5", 8, 150, 50
SAMPLES = 40_000
"""Records of each kind, drawn once."""


class Kind(NamedTuple):
    """Samples of one kind: their share, and the least and most frames; text has none and a log-normal length."""

    name: str
    weight: float
    frames: tuple[int, int]


CASES = {
    "images, videos of 8 to 160 frames, text": (
        32_768,
        (Kind("image", 0.5, (1, 1)), Kind("video", 0.3, (8, 160)), Kind("text", 0.2, (0, 0))),
    ),
    "videos of 8 to 1,300 frames": (262_144, (Kind("video", 1.0, (8, 1300)),)),
}


class FirstFit(Stream):
    """The same window, packed by first fit."""

    def _pack(self, records: np.ndarray) -> list[list[int]]:
        return first_fit(self.cards.tokens[records].tolist(), self.rows, self.seq_length)


def first_fit(tokens: Sequence[int], rows: int, capacity: int) -> list[list[int]]:
    """Places of the samples of each row: each sample goes to the first row that has room for it."""
    room = [capacity] * rows
    packed: list[list[int]] = [[] for _ in range(rows)]
    for place, size in enumerate(tokens):
        row = next((row for row in range(rows) if size <= room[row]), None)
        if row is not None:
            room[row] -= size
            packed[row].append(place)
    return packed


def made_up_cards(config: Config, kinds: Sequence[Kind], seq_length: int, seed: int = 0) -> Cards:
    """``SAMPLES`` records of each kind, one kind after the other; videos that are too long lose frames."""
    random, pictures = np.random.default_rng(seed), pictures_of(config.model)
    (unit,) = pictures.units(1, True)
    separators = len(config.data.frame_separator_ids)
    cards = Cards(SAMPLES * len(kinds))
    for number, kind in enumerate(kinds):
        if kind.frames[1]:
            asked = random.integers(kind.frames[0], kind.frames[1] + 1, SAMPLES)
            text = random.integers(30, 400, SAMPLES)
        else:
            asked = np.zeros(SAMPLES, dtype=np.int64)
            text = np.clip(random.lognormal(6.5, 1.0, SAMPLES).astype(np.int64), 16, seq_length)
        fit = np.array([most_frames(pictures, seq_length - words, separators) for words in range(401)])
        frames = np.minimum(asked, fit[np.minimum(text, 400)]) if kind.frames[1] else asked
        rows = dict.fromkeys(FIELDS, np.zeros(SAMPLES, dtype=np.int64))
        rows |= {
            "state": np.full(SAMPLES, USABLE),
            "tokens": text + frames * (unit.tokens + separators),
            "labels": text // 3,
            "cut": asked - frames,
            "squares": frames * unit.squares,
            "visual_tokens": frames * unit.tokens,
            "vision": frames * unit.cost,
        }
        records = np.arange(number * SAMPLES, (number + 1) * SAMPLES)
        cards.put(records, np.stack([rows[name] for name in FIELDS], axis=1))
    return cards


def measured(case: str, rows: int, packer: str, steps: int = STEPS) -> dict[str, Any]:
    """Figures of ``steps`` steps of ``rows`` rows."""
    seq_length, kinds = CASES[case]
    config = load_config(PRESET, [f"train.seq_length={seq_length}"])
    weights = [kind.weight for kind in kinds]
    stream = (Stream if packer == "best_fit" else FirstFit)(
        SampleOrder([SAMPLES] * len(kinds), 0, True, weights),
        made_up_cards(config, kinds, seq_length),
        flop_prices(config.model, config.optim, pictures=True),
        rows=rows,
        packing=True,
        seq_length=seq_length,
        vision_capacity=row_vision(pictures_of(config.model), seq_length),
    )
    plans: list[StepPlan] = []
    times, spreads, state = [], [], StreamState()
    for _ in range(steps):
        started_s = time.perf_counter()
        plan = stream.plan(state)
        in_turn = [list(range(replica, rows, REPLICAS)) for replica in range(REPLICAS)]
        hands = deal_rows(plan.costs, REPLICAS) if packer == "best_fit" else in_turn
        times.append(time.perf_counter() - started_s)
        spreads.append(spread(plan.costs, hands))
        plans.append(plan)
        state = plan.after
    useful = np.array([plan.tokens for plan in plans]) / (rows * seq_length)
    return {
        "case": case,
        "seq_len": seq_length,
        "rows": rows,
        "packer": packer,
        "steps": steps,
        "useful": round(float(useful.mean()), 4),
        "useful_of_worst_step": round(float(useful.min()), 4),
        "spread": round(float(np.mean(spreads)), 4),
        "spread_of_worst_step": round(max(spreads), 4),
        "share_off": round(_share_off(plans, weights), 4),
        "waiting": len(state.waiting),
        "plan_ms": round(1e3 * float(np.median(times)), 1),
        "plan_ms_of_worst_step": round(1e3 * max(times), 1),
    }


def _share_off(plans: Sequence[StepPlan], weights: Sequence[float]) -> float:
    """How far the share of a kind in any ``WINDOW`` successive steps is from its weight, relative to the weight."""
    kinds = np.stack(
        [
            np.bincount(np.concatenate([np.array(row) for row in plan.rows]) // SAMPLES, minlength=len(weights))
            for plan in plans
        ]
    )
    sums = np.cumsum(np.vstack([np.zeros_like(kinds[:1]), kinds]), axis=0)
    counts = sums[WINDOW:] - sums[:-WINDOW]
    shares = counts / counts.sum(axis=1, keepdims=True) / (np.array(weights) / sum(weights))
    return float(np.abs(shares - 1).max())


@entry_point
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 8], help="rows of a step")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.packing", *arguments])
    table = []
    for case in CASES:
        for rows in options.rows:
            for packer in ("first_fit", "best_fit"):
                row = measured(case, rows, packer, options.steps)
                print(row, flush=True)
                table.append(row | {"hardware": hardware(1), "versions": f"numpy {np.__version__}", "command": command})
    with open(options.out, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The place of a run in its stream of samples, as a checkpoint keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from megatron_vila.config.schema import Config
from megatron_vila.data.sources.open import Blend
from megatron_vila.data.stream import StreamState
from megatron_vila.errors import CheckpointError

_OLD_COUNTS = {"replaced_broken": "left_out_broken", "left_out": "left_out_broken", "replaced_too_long": "left_out_too_long"}
"""Counts of earlier versions, which put another sample in the place of one that cannot be used."""


def order_key(config: Config, blend: Blend) -> str:
    """A key of the order of samples: two runs with the same key draw the same samples in the same order."""
    settings = [blend.records.digest, blend.sizes, blend.weights, config.train.seed, config.data.shuffle]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def kept_place(state: StreamState, key: str) -> dict[str, Any]:
    """What a checkpoint keeps: ``state`` in the order with ``key``."""
    return {"order": key} | state.to_json()


def place_of(kept: Any, key: str, drawn: int, samples: int) -> tuple[StreamState, str]:
    """Where a run that continues from a checkpoint stands in the order with ``key``, of ``samples`` records.

    ``kept`` is None if the checkpoint keeps no place, as those of earlier versions. The text says why the run does not continue
    at the place of the saved run; it is empty if the run does.

    Raises ``CheckpointError`` if ``kept`` is not what a run has saved.
    """
    if kept is None:
        return StreamState(following=drawn), (
            f"the checkpoint is of a version that did not keep its place among the samples: the run goes on after the {drawn} "
            "samples that were drawn; those that had taken the place of another one come again in this epoch"
        )
    try:
        if not isinstance(kept, dict) or not isinstance(kept.get("order"), str):
            raise ValueError("no order of samples is named")
        if kept["order"] == key:
            return StreamState.from_json(kept, samples), ""
        return StreamState(following=StreamState.from_json(kept | {"undecodable": []}, samples).following), (
            "the samples are not those of the saved run, or in another order (files of data.train, data.weights, data.shuffle, "
            "train.seed): some come again in this epoch, others do not come"
        )
    except ValueError as error:
        raise CheckpointError(f"the place among the samples in the checkpoint is damaged: {error}") from error


def carried_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of a checkpoint under their names of today."""
    carried: dict[str, int] = {}
    for name, count in counts.items():
        today = _OLD_COUNTS.get(name, name)
        carried[today] = carried.get(today, 0) + count
    return carried

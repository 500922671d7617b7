"""Whether the ranks that share a sample were given the same samples: told on all of them before anything else is exchanged.

A rank that sees other samples than its neighbors would attend to keys of another text, or wait for tokens that never come. So
the collator, in the workers of a DataLoader, makes a fingerprint of each row, and the training processes compare them on the
host: 64 bytes, which no GPU waits for. A comparison on the GPU would come too late, since rows of unequal lengths fail in the
first exchange.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vila.hf.mm_sp.adapters import VisionUnit
from megatron_vila.plan.row import Row

_SIZES = ("samples", "tokens", "pictures and frames", "label fields")
_CONTENTS = ("input_ids", "labels", "lengths of samples", "pictures and videos")


def fingerprint(
    row: Row, units: Sequence[VisionUnit], positions: Sequence[np.ndarray | None], has_labels: bool
) -> np.ndarray:
    """Int64 [8] of a row: its numbers of samples, tokens and units of vision, whether it has labels, and digests of the contents.

    Of the units only sizes and ``positions`` of tokens, where the model has its own, count, because each rank reads no pixel but
    its own.
    """
    lengths = list(row.lengths)
    sizes = [len(lengths), sum(lengths), len(units), int(has_labels)]
    shapes = [number for unit in units for number in (unit.rows, unit.tokens, unit.is_video, unit.ends, *unit.grid)]
    shapes += [int(number) for own in positions if own is not None for number in own.sum(axis=1)]
    return np.asarray([*sizes, *(_digest(values) for values in (row.token_ids, row.labels, lengths, shapes))], np.int64)


def _digest(values: Any) -> int:
    data = np.ascontiguousarray(values, dtype=np.int64)
    return int.from_bytes(hashlib.blake2b(data.tobytes(), digest_size=8).digest(), "little", signed=True)


def check_same_row(mine: np.ndarray, host: dist.ProcessGroup) -> None:
    """Raise ``ValueError`` on every rank of ``host``, a group that exchanges host memory, unless all give the same
    ``fingerprint``. An all-gather over ``host``; no device is waited for."""
    if host.size() == 1:
        return
    told = [torch.empty(len(mine), dtype=torch.int64) for _ in range(host.size())]
    dist.all_gather(told, torch.from_numpy(mine), group=host)
    rows = torch.stack(told).numpy()
    differ = (rows != rows[0]).any(axis=0)
    if not differ.any():
        return
    names = [name for name, is_other in zip(_SIZES + _CONTENTS, differ, strict=True) if is_other]
    other = int((rows != rows[0]).any(axis=1).argmax())
    raise ValueError(
        f"the {len(rows)} ranks of one MM-SP group were given different samples: {', '.join(names)} differ. Rank 0 of the group "
        f"has {_told(rows[0])}, rank {other} has {_told(rows[other])}. They share each sample, so give the sampler one rank for "
        "each group, DistributedSampler(dataset, mm_sp.dp_size, mm_sp.dp_rank), leave the loader out of accelerate's "
        "prepare, put MMSPTrainer before a Trainer, and draw random crops and masks from the same seed on all ranks of a group"
    )


def _told(row: np.ndarray) -> str:
    samples, tokens, units, has_labels = (int(value) for value in row[: len(_SIZES)])
    return f"{samples} samples of {tokens} tokens and {units} pictures and frames {'with' if has_labels else 'without'} labels"

"""A snapshot: what was read of a prompt, kept on disk, so that the next question about the same video needs no prefill.

Each rank writes its keys and values as they lie in its cache, and reads them again at the speed of the disk. So a snapshot
belongs to one model, one (tp, ulysses, ring) and one dtype of the cache; anything else is refused. All ranks call the functions
of this file alike, and all raise if one fails; the folder must be one that they share.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from megatron_vila import accelerator
from megatron_vila.data.media import MediaSource
from megatron_vila.errors import CheckpointError
from megatron_vila.generate import snapshot_files
from megatron_vila.generate.engine import CACHE_DTYPES, Prefix
from megatron_vila.generate.raw_tensors import file_bytes, read_tensors, write_tensors
from megatron_vila.generate.snapshot_files import RankFile, SnapshotInfo, rank_file, read_snapshot_info
from megatron_vila.parallel.agreement import gathered, on_all_ranks, on_rank_zero
from megatron_vila.parallel.cache import Span, SpanShape
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.grid import GridShape

logger = logging.getLogger(__name__)

_CACHES = {dtype: name for name, dtype in CACHE_DTYPES.items()}


def save(
    folder: str | Path,
    prefix: Prefix,
    topology: ParallelTopology,
    model: str,
    content_of: Callable[[MediaSource], str],
) -> None:
    """Save ``prefix`` as ``folder``; a snapshot that stands there is replaced once this one is whole.

    ``model`` identifies the model's weights and settings, ``content_of`` hashes the content of a file. Collective over all ranks.
    Raises ``CheckpointError`` on all of them; then nothing is left of it.
    """
    folder, span = Path(os.path.abspath(folder)), prefix.span
    failed = f"the snapshot {folder} cannot be saved"
    tensors = list(_tensors(span, torch.from_numpy(span.positions)))
    size = sum(gathered(file_bytes(tensors)))
    with contextlib.ExitStack() as held:
        partial = on_rank_zero(lambda: held.enter_context(snapshot_files.writing(folder, size)), failed)
        path = partial / rank_file(topology.rank)
        sums = on_all_ranks(lambda: write_tensors(path, tensors), failed)
        ranks = gathered(RankFile(span.length, span.k.shape[2], file_bytes(tensors), tuple(sums)))

        def finish() -> None:
            info = SnapshotInfo(
                model=model,
                key=prefix.key,
                tokens=prefix.tokens,
                layout=_layout(topology.grid),
                cache=_CACHES[span.k.dtype],
                layers=span.k.shape[0],
                head_dim=span.k.shape[3],
                media=snapshot_files.media_of(prefix.document, content_of),
                ranks=tuple(ranks),
                document_bytes=0,
                document_sum="",
                saved=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            snapshot_files.finish(folder, partial, prefix.document, info)

        on_rank_zero(finish, failed)


def load(
    folder: str | Path,
    topology: ParallelTopology,
    model: str,
    shape: SpanShape,
    dtype: torch.dtype,
    content_of: Callable[[MediaSource], str],
    room: int = 0,
) -> Prefix:
    """The prefix that was saved as ``folder``, on this rank's device, with ``room`` for more tokens of this rank.

    ``model``, ``shape`` and ``dtype`` are those of the engine that takes it up. The log tells of a video that has changed since:
    the snapshot is of what it was. Collective over all ranks. Raises ``CheckpointError`` on all of them for a snapshot of
    something else or one that does not fit the device, ``DamagedError`` for files that are not what was written.
    """
    folder = Path(os.path.abspath(folder))
    failed = f"the snapshot {folder} cannot be taken up"
    info, changed = on_rank_zero(lambda: _told(folder, content_of), failed)
    if problem := _problem(info, topology.grid, model, dtype):
        raise CheckpointError(f"{failed}: {problem}")
    for path in changed:
        if topology.rank == 0:
            logger.warning(
                "%s has changed since the snapshot %s was saved: answers are about what it was", path, folder
            )

    def read() -> Prefix:
        mine = info.ranks[topology.rank]
        found = SpanShape(info.layers, mine.kv_heads, info.head_dim)
        if found != shape:
            raise CheckpointError(f"it is of a model with {found}, not {shape}")
        span = _empty(shape, mine.tokens, room, dtype)
        positions = torch.empty(mine.tokens, dtype=torch.int64)
        read_tensors(folder / rank_file(topology.rank), list(_tensors(span, positions)), mine.sums)
        span.commit(positions.numpy())
        return Prefix(snapshot_files.read_document(folder, info), span, info.key, info.tokens)

    return on_all_ranks(read, failed)


def _told(folder: Path, content_of: Callable[[MediaSource], str]) -> tuple[SnapshotInfo, list[str]]:
    info = read_snapshot_info(folder)
    return info, snapshot_files.changed(info.media, content_of)


def _problem(info: SnapshotInfo, grid: GridShape, model: str, dtype: torch.dtype) -> str | None:
    """Why this run cannot take a snapshot, and what to set."""
    layout, cache = _layout(grid), _CACHES[dtype]
    if info.model != model:
        return f"it is of another model ({info.model}, this one is {model}); ask that one, or read the video again with this one"
    if info.layout != layout:
        ranks = " ".join(f"--{name} {size}" for name, size in info.layout.items())
        return f"it was saved with {_words(info.layout)} and this run has {_words(layout)}; use {ranks} ({len(info.ranks)} ranks)"
    if info.cache != cache:
        return (
            f"its cache is {info.cache} and this run's is {cache}; use --cache {info.cache} (cache_dtype={info.cache})"
        )
    return None


def _layout(grid: GridShape) -> dict[str, int]:
    return {"tp": grid.tp, "ulysses": grid.ulysses, "ring": grid.ring}


def _words(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in layout.items())


def _tensors(span: Span, positions: torch.Tensor) -> Iterator[torch.Tensor]:
    """What is stored, in its order: ``positions``, and of each layer the first ``len(positions)`` tokens."""
    yield positions
    stored = [x for x in (span.k, span.v, span.k_scale, span.v_scale) if x is not None]
    for layer in range(span.k.shape[0]):
        for x in stored:
            yield x[layer, : len(positions)]


def _empty(shape: SpanShape, tokens: int, room: int, dtype: torch.dtype) -> Span:
    try:
        return Span.empty(shape, tokens + room, dtype, accelerator.device())
    except torch.OutOfMemoryError as error:
        needed, free = (tokens + room) * shape.token_bytes(dtype) / GIB, accelerator.free_device_bytes() / GIB
        raise CheckpointError(
            f"it takes {needed:.1f} GiB of each device and {free:.1f} GiB are free; let go of other prefixes, or read the video "
            "again on more ranks or with a smaller cache (--cache fp8)"
        ) from error

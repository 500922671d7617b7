"""A snapshot of several ranks: one file each, one outcome for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.generate.engine import Request, Sampling
from megatron_vila.generate.snapshot import load, save
from megatron_vila.parallel.topology import ParallelTopology
from tests import samples
from tests.generate.engines import destroy, engine, requests
from tests.generate.kept import MODEL, SHAPE, content_of, document, prefix_of, stored_bytes
from tests.ranks import pool
from tests.samples import config


def _two_ranks(rank: int, folder: Path):
    """Save on two ring ranks and load again; then with one rank's file damaged."""
    topology = ParallelTopology.create(ParallelConfig(ring=2))
    prefix = prefix_of(folder, torch.bfloat16, length=300 + rank, rank=rank)
    save(folder / "kept", prefix, topology, MODEL, content_of)
    back = load(folder / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of)
    equal = stored_bytes(back.span) == stored_bytes(prefix.span)
    if rank == 1:
        file = folder / "kept" / "rank-00001.kv"
        with open(file, "r+b") as stream:
            stream.write(b"x")
    dist.barrier()
    try:
        load(folder / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of)
        told = ""
    except DamagedError as error:
        told = str(error)
    return equal, told


def _asked_again(rank: int, folder: Path):
    """Read a prompt, keep it, and answer from what was kept, in an engine that encodes nothing."""
    parallel = ParallelConfig(ulysses=2, ring=2)
    made, pictures = engine(config(layers=2), parallel, torch.float32, cache_dtype="fp8", chunk_tokens=8)
    plain = samples.document("video", "ttFFFtFFtFVttTttt")
    frames = tuple(replace(frame, source=str(folder / frame.source)) for frame in plain.frames)
    asked = requests(made, pictures, [replace(plain, frames=frames)])
    answers = made.answer(asked, Sampling(max_new_tokens=5))
    save(folder / "kept", asked[0].prefix, made.topology, MODEL, content_of)
    tail = asked[0].tail
    del asked
    destroy(made)
    made, pictures = engine(config(layers=2), parallel, torch.float32, cache_dtype="fp8", chunk_tokens=8)
    back = load(folder / "kept", made.topology, MODEL, made.span_shape, made.cache_dtype, content_of)
    again = made.answer([Request(back, tail)], Sampling(max_new_tokens=5))
    made.hold(back)
    beginning, _ = made.split(replace(plain, frames=frames))
    is_known = made.prefill(beginning, pictures, back.key) is back
    destroy(made)
    return answers[0].token_ids.tolist(), again[0].token_ids.tolist(), is_known, pictures.encoded


def test_a_snapshot_answers_as_the_engine_that_saved_it_and_nothing_is_encoded_again(tmp_path):
    for frame in samples.document("video", "ttFFFtFFtFVttTttt").frames:
        (tmp_path / frame.source).write_bytes(frame.source.encode())
    for first, again, is_known, encoded in pool.run(4, _asked_again, tmp_path):
        assert again == first and is_known and encoded == []


def _one_rank(rank: int, folder: Path) -> str:
    try:
        load(folder, ParallelTopology.create(ParallelConfig()), MODEL, SHAPE, torch.bfloat16, content_of)
    except CheckpointError as error:
        return str(error)
    return ""


def test_each_rank_has_its_own_file_damage_of_one_is_told_by_all_and_another_layout_is_refused(tmp_path):
    document(tmp_path)
    for equal, told in pool.run(2, _two_ranks, tmp_path):
        assert equal
        assert "cannot be taken up (rank 1): rank-00001.kv is damaged: bytes 0 to" in told
    (told,) = pool.run(1, _one_rank, tmp_path / "kept")
    assert (
        "saved with tp=1 ulysses=1 ring=2 and this run has tp=1 ulysses=1 ring=1; use --tp 1 --ulysses 1 --ring 2 (2 ranks)"
        in told
    )

"""What was read of a prompt goes to disk and comes back bit for bit, or is refused with what to set."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vila import accelerator, processes
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.errors import CheckpointError, DamagedError
from megatron_vila.generate import snapshot_files
from megatron_vila.generate.snapshot import load, read_snapshot_info, save
from megatron_vila.parallel.cache import FP8
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import Document
from tests.generate.kept import MODEL, SHAPE, content_of, prefix_of, stored_bytes


@pytest.fixture(scope="module")
def topology():
    """One rank, in this process. Ranks that were forked beside it would have it too: their test has a file of its own."""
    accelerator.prepare()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ParallelTopology.create(ParallelConfig())
    processes.end_distributed()


def _same(a: Document, b: Document) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("token_ids", "labels", "frame_starts"))
    return arrays and (a.frames, a.sample_id, a.media) == (b.frames, b.sample_id, b.media)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, FP8], ids=str)
def test_a_prefix_comes_back_bit_for_bit_with_the_room_that_is_asked_for(topology, tmp_path, dtype):
    prefix = prefix_of(tmp_path, dtype)
    save(tmp_path / "kept", prefix, topology, MODEL, content_of)
    back = load(tmp_path / "kept", topology, MODEL, SHAPE, dtype, content_of, room=40)
    assert stored_bytes(back.span) == stored_bytes(prefix.span)
    assert (back.span.capacity, back.span.length, back.span.device_length.tolist()) == (740, 700, [700])
    assert (back.key, back.tokens) == (prefix.key, prefix.tokens) and _same(back.document, prefix.document)
    stored = (tmp_path / "kept" / "rank-00000.kv").stat().st_size
    assert stored - 4096 < 700 * (8 + SHAPE.token_bytes(dtype)) <= stored  # not what there is only room for


def test_a_prefix_without_tokens_on_a_rank_is_kept_too(topology, tmp_path):
    prefix = prefix_of(tmp_path, torch.float32, length=0)
    save(tmp_path / "kept", prefix, topology, MODEL, content_of)
    assert load(tmp_path / "kept", topology, MODEL, SHAPE, torch.float32, content_of).span.length == 0


def test_another_model_cache_or_shape_is_refused_with_what_to_set(topology, tmp_path):
    save(tmp_path / "kept", prefix_of(tmp_path, FP8), topology, MODEL, content_of)
    cases = {
        "it is of another model (model-a, this one is model-b)": ("model-b", SHAPE, FP8),
        "its cache is fp8 and this run's is bf16; use --cache fp8": (MODEL, SHAPE, torch.bfloat16),
        "it is of a model with SpanShape(layers=3, kv_heads=2, head_dim=8)": (MODEL, replace(SHAPE, kv_heads=4), FP8),
    }
    for text, (model, shape, dtype) in cases.items():
        with pytest.raises(CheckpointError) as refused:
            load(tmp_path / "kept", topology, model, shape, dtype, content_of)
        assert f"the snapshot {tmp_path / 'kept'} cannot be taken up" in str(refused.value)
        assert text in str(refused.value)
        assert not isinstance(refused.value, DamagedError)


@pytest.mark.parametrize("name", ["info.json", "document", "rank-00000.kv"])
@pytest.mark.parametrize("change", ["bit", "cut", "gone"])
def test_damage_to_any_file_is_told(topology, tmp_path, name, change):
    save(tmp_path / "kept", prefix_of(tmp_path, torch.bfloat16), topology, MODEL, content_of)
    file = tmp_path / "kept" / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + (bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if change == "bit" else b""))
    if change == "gone":
        file.unlink()
    expected = CheckpointError if (name, change) == ("info.json", "gone") else DamagedError
    with pytest.raises(expected, match=f"{name}|there is no snapshot"):
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of)


def test_a_snapshot_of_a_later_format_says_to_update(topology, tmp_path):
    save(tmp_path / "kept", prefix_of(tmp_path, FP8), topology, MODEL, content_of)
    file = tmp_path / "kept" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads up to 1; update megatron_vila"):
        load(tmp_path / "kept", topology, MODEL, SHAPE, FP8, content_of)


def test_a_save_that_was_killed_is_never_taken_and_the_next_one_cleans_it_up(topology, tmp_path):
    """A child process that is killed while it writes."""
    prefix = prefix_of(tmp_path, torch.bfloat16)
    child = os.fork()
    if not child:
        with snapshot_files.writing(tmp_path / "kept", 0) as partial:
            (partial / "rank-00000.kv").write_bytes(b"some")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".kept.partial").exists()
    with pytest.raises(
        CheckpointError, match=r"there is no snapshot \(.kept.partial beside it was not finished: save it again\)"
    ):
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of)
    save(tmp_path / "kept", prefix, topology, MODEL, content_of)
    assert not (tmp_path / ".kept.partial").exists()
    assert stored_bytes(
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of).span
    ) == stored_bytes(prefix.span)


def test_a_second_save_to_a_folder_is_refused_while_the_first_goes_on(topology, tmp_path):
    prefix = prefix_of(tmp_path, torch.bfloat16)
    save(tmp_path / "kept", prefix, topology, MODEL, content_of)
    with snapshot_files.writing(tmp_path / "kept", 0) as partial:
        (partial / "rank-00000.kv").write_bytes(b"some")
        with pytest.raises(CheckpointError, match="kept cannot be saved: another process saves there now"):
            save(tmp_path / "kept", prefix, topology, MODEL, content_of)
        assert (partial / "rank-00000.kv").read_bytes() == b"some"
    save(tmp_path / "kept", prefix, topology, MODEL, content_of)


def test_a_failed_save_leaves_the_earlier_snapshot_and_nothing_else(topology, tmp_path):
    first = prefix_of(tmp_path, torch.bfloat16)
    save(tmp_path / "kept", first, topology, MODEL, content_of)
    before = sorted(os.listdir(tmp_path))
    gone = replace(
        first, document=replace(first.document, frames=(replace(first.document.frames[0], source="/gone.mp4"),))
    )
    with pytest.raises(CheckpointError, match="kept cannot be saved: .*/gone.mp4"):
        save(tmp_path / "kept", gone, topology, MODEL, content_of)
    in_memory = replace(
        first, document=replace(first.document, frames=(replace(first.document.frames[0], source=b"abc"),))
    )
    with pytest.raises(CheckpointError, match="3 bytes in memory is no file of its own"):
        save(tmp_path / "kept", in_memory, topology, MODEL, content_of)
    assert sorted(os.listdir(tmp_path)) == before
    assert stored_bytes(
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.bfloat16, content_of).span
    ) == stored_bytes(first.span)


def test_a_new_snapshot_replaces_the_earlier_one_but_nothing_else(topology, tmp_path):
    save(tmp_path / "kept", prefix_of(tmp_path, torch.bfloat16), topology, MODEL, content_of)
    second = prefix_of(tmp_path, torch.float32, length=11)
    save(tmp_path / "kept", second, topology, MODEL, content_of)
    assert stored_bytes(
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.float32, content_of).span
    ) == stored_bytes(second.span)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
    (tmp_path / "mine").mkdir()
    save(tmp_path / "mine", second, topology, MODEL, content_of)  # an empty folder holds nothing to lose
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    for other in ("work", "hour.mp4"):
        with pytest.raises(CheckpointError, match="something else than a snapshot stands there; name another folder"):
            save(tmp_path / other, second, topology, MODEL, content_of)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_a_disk_without_room_is_told_before_anything_is_written(topology, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    prefix = prefix_of(tmp_path, torch.bfloat16)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=r"it takes 0.0 GiB and the disk of .* has 0.0 GiB free; make room"):
        save(tmp_path / "kept", prefix, topology, MODEL, content_of)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_video_that_has_changed_since_is_told_and_one_that_is_gone_or_only_touched_is_not(topology, tmp_path, caplog):
    save(tmp_path / "kept", prefix_of(tmp_path, torch.bfloat16), topology, MODEL, content_of)
    video = tmp_path / "hour.mp4"

    read = []

    def reading(path) -> str:
        read.append(str(path))
        return content_of(path)

    def told() -> list[str]:
        caplog.clear()
        read.clear()
        load(tmp_path / "kept", topology, MODEL, SHAPE, torch.bfloat16, reading)
        return [record.getMessage() for record in caplog.records if "has changed since" in record.getMessage()]

    assert told() == [] and read == []
    os.utime(video, ns=(1, 1))
    assert told() == [] and read == [str(video)]
    video.write_bytes(video.read_bytes()[:-1] + b"!")
    assert len(told()) == 1
    video.unlink()
    assert told() == []


def test_info_names_the_media_with_what_tells_them_apart(topology, tmp_path):
    save(tmp_path / "kept", prefix_of(tmp_path, torch.bfloat16), topology, MODEL, content_of)
    info = read_snapshot_info(tmp_path / "kept")
    video, pictures = info.media
    assert (video.path, video.is_video, video.content) == (str(tmp_path / "hour.mp4"), True, content_of(video.path))
    assert video.state[0] == os.path.getsize(video.path)
    assert pictures.pictures == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert (info.model, info.cache, info.key, info.tokens) == (MODEL, "bf16", "key-of-it", 18)

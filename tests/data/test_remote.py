"""Shards behind an address: the same samples, pieces fetched once for a node within their room, clear ends of what is lost."""

import fcntl
import itertools
import os
import shutil
import socket
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import DataConfig
from megatron_vila.data.failures import FailureReasons
from megatron_vila.data.fields import RecordError
from megatron_vila.data.media import MediaError, open_media, state_of
from megatron_vila.data.sources import remote
from megatron_vila.data.sources import shards as shards_module
from megatron_vila.data.sources.open import open_records
from megatron_vila.data.sources.pieces import PieceCache
from megatron_vila.data.sources.remote import UnreachableError
from megatron_vila.data.sources.source import ChangedFileError
from megatron_vila.data.video import decode_video_frames, probe_video
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.validate import value_problems
from tests.data.http_files import served
from tests.data.shard_files import sample, write_shards
from tests.data.stamped import number_of, write

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of two shards: samples s0 to s7, each with a video of 30 frames but for the last."""
    folder = tmp_path_factory.mktemp("set")
    write(folder / "a.mp4", 30, gop=10)
    video = (folder / "a.mp4").read_bytes()
    samples = [(f"{n:02d}", {"json": sample(n, video="0.mp4"), "0.mp4": video}) for n in range(7)] + [
        ("07", {"json": sample(7)})
    ]
    return write_shards(folder / "shards", [samples[:4], samples[4:]])


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(shards_module, "HEAD", 512)


@pytest.fixture
def data(tmp_path):
    return replace(DataConfig(), media_format="verbatim", cache_dir=str(tmp_path / "pieces"))


@pytest.fixture
def files(shards, tmp_path):
    """A copy of the shards behind an HTTP server."""
    shutil.copytree(shards, tmp_path / "set")
    with served(tmp_path / "set") as files:
        yield files


def content(record):
    with open_media(record.media[0].path) as file:
        return file.read()


def kept_bytes(data):
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(data.cache_dir)
        for name in names
        if name != "bytes"
    )


@pytest.mark.parametrize("scheme", ["memory", "http", "file"])
def test_samples_behind_an_address_are_those_of_the_folder(scheme, shards, data, files, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 700)
    address = {"memory": "memory://set", "http": files.url, "file": f"file://{shards}"}[scheme]
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(shards), "/set", recursive=True)
    there, here = open_records(data, [address]), open_records(data, [str(shards)])
    assert len(there) == 8 and there.digest == here.digest and there.name(5) == f"{address}/000001.tar, sample 05"
    for index in (5, 0, 7):
        mine, local = there.record(index), here.record(index)
        assert (mine.sample_id, mine.turns, len(mine.media)) == (local.sample_id, local.turns, len(local.media))
    video, local = there.record(5).media[0].path, here.record(5).media[0].path
    assert state_of(video)[0] == local.size > 2 * remote.PIECE
    assert np.array_equal(probe_video(video).pts, probe_video(local).pts)
    assert [number_of(picture) for picture in decode_video_frames(video, [0, 9, 29])] == [0, 9, 29]
    assert content(there.record(1)) == content(here.record(1))


def test_a_piece_is_fetched_once_whoever_asks_and_a_second_run_fetches_none(data, files):
    sources = [open_records(data, [files.url]) for _ in range(4)]
    files.asked.clear()
    barrier, found = threading.Barrier(8), []

    def read(source, index):
        barrier.wait()
        found.append(content(source.record(index)))

    threads = [threading.Thread(target=read, args=pair) for pair in itertools.product(sources, (0, 1))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 8 and len(set(found)) == 1
    assert len(files.asked) == len(set(files.asked)) == 2, "a request for each of the two samples"
    files.asked.clear()
    assert content(open_records(data, [files.url]).record(1)) == found[0]
    assert not [path for path, *_ in files.asked if path.endswith((".tar", ".sqlite"))]


def test_of_a_long_sample_only_the_pieces_that_are_read_travel(data, files, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1024)
    records = open_records(data, [files.url])
    files.asked.clear()
    video = records.record(3).media[0].path
    with open_media(video) as file:
        file.seek(-1, os.SEEK_END)
        file.read(1)
    assert 2 <= len(files.asked) <= 4 and all(end - first <= 1024 for _, first, end in files.asked)


def test_the_room_is_kept_and_what_was_used_least_recently_goes(data, files):
    size = 40_000
    piece = {name: bytes([n]) * size for n, name in enumerate("abcdef")}
    cache, fetched = PieceCache(Path(data.cache_dir), 4 * size), []

    def read(name):
        answer = cache.read(name, 0, size, 10, 5, lambda: fetched.append(name) or piece[name])
        assert answer == piece[name][:5] and kept_bytes(data) <= 4 * size

    for age, name in enumerate("abcd"):
        read(name)
        (file,) = (file for file in Path(data.cache_dir).glob("*/*.piece") if file.read_bytes() == piece[name])
        os.utime(file, (1000 + age, 1000 + age))
    read("a")
    read("e")
    read("a")
    assert "".join(fetched) == "abcde", "a was used again, so b left"
    read("b")
    assert "".join(fetched) == "abcdeb"


def test_a_piece_that_is_read_is_not_removed_and_one_without_room_is_given_all_the_same(data):
    cache = PieceCache(Path(data.cache_dir), 1000)
    cache.read("a", 0, 900, 0, 1, lambda: bytes(900))
    (file,) = Path(data.cache_dir).glob("*/*.piece")
    with file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        assert cache.read("b", 0, 900, 899, 1, lambda: bytes(899) + b"x") == b"x" and file.exists()
        assert kept_bytes(data) <= 1000
    cache.read("b", 0, 900, 0, 1, lambda: bytes(900))
    assert not file.exists() and kept_bytes(data) == 900


def test_pieces_that_were_damaged_are_fetched_again(data, files):
    records = open_records(data, [files.url])
    before = content(records.record(0))
    for file in Path(data.cache_dir).glob("*/*.piece"):
        file.write_bytes(file.read_bytes()[:100])
    assert content(records.record(0)) == before


def test_what_fails_for_a_moment_is_tried_again(data, files):
    records = open_records(data, [files.url])
    for faults in ([503, 500], ["cut"], [503, "cut", 429]):
        files.faults[:] = faults
        shutil.rmtree(data.cache_dir, ignore_errors=True)
        assert content(records.record(0)) and not files.faults


@pytest.mark.parametrize("fault", [503, "cut", "whole"])
def test_what_fails_for_longer_ends_the_run_by_shard_and_key_after_a_few_attempts(data, files, fault):
    records = open_records(data, [files.url])
    files.asked.clear()
    files.faults[:] = [fault] * 50
    with pytest.raises(
        UnreachableError, match=r"at sample 02: http://.*/000000\.tar: cannot be read after 4 attempts: .*start again"
    ):
        records.record(2)
    assert len(files.asked) == 4


def test_a_shard_that_vanishes_ends_the_run_wherever_it_is_met(data, files, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1024)
    records = open_records(data, [files.url])
    video = records.record(0).media[0].path
    os.unlink(files.folder / "000000.tar")
    os.unlink(files.folder / "000001.tar")
    with pytest.raises(ChangedFileError, match="at sample 05: http://.*/000001.tar: the shard is gone"):
        records.record(5)
    with pytest.raises(MediaError) as error:
        probe_video(video)
    with pytest.raises(ChangedFileError, match="at sample s0: http://.*/000000.tar: the shard is gone"):
        FailureReasons().reason(error.value, "s0")


def test_a_shard_that_changes_is_told_and_old_pieces_are_not_mixed_with_new_ones(data, files, shards):
    records = open_records(data, [files.url])
    records.record(0)
    tar = files.folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"Question 0?", b"Another 0?!"))
    fresh = open_records(data, [files.url])
    assert "Another" in fresh.record(0).turns[0].text
    with open(tar, "ab") as stream:
        stream.write(b"more")
    with pytest.raises(ChangedFileError, match="at sample 00: .*000000.tar: the shard has .* bytes and had"):
        open_records(data, [files.url]).record(0)


def test_an_address_that_cannot_be_read_is_refused_by_name_and_cure(data, files, tmp_path):
    for address, words in (
        (f"{files.url}/nowhere", r"nowhere/\.nv-meta/\.info\.json: there is no such file"),
        ("nosuch://bucket/set", "nosuch://bucket/set: not an address that can be read: Protocol not known"),
        ("hdfs://bucket/set", "hdfs://bucket/set: .*(not installed|cannot be read|not an address)"),
    ):
        with pytest.raises(RecordError, match=words):
            open_records(data, [address])
    os.unlink(files.folder / "000001.tar")
    with pytest.raises(RecordError, match=r"/000001\.tar: there is no such file; prepare the folder again"):
        open_records(data, [files.url])


def test_a_server_that_is_away_is_tried_again_and_not_told_as_a_missing_file(data):
    def hang_up(server):
        with suppress(OSError):
            while True:
                server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/set"
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        with pytest.raises(RecordError, match="/set/.*: cannot be read after 4 attempts: .*look at the network"):
            open_records(data, [address])
        server.shutdown(socket.SHUT_RDWR)
    with pytest.raises(RecordError, match="/set/.*: cannot be read after 4 attempts: .*look at the network"):
        open_records(data, [address])


def test_a_cache_without_room_for_the_pieces_in_use_is_refused():
    for value, said in ((0.25, 0), (0.1, 1), (float("nan"), 1)):
        config = load_config("tiny", [])
        config.data.cache_gib = value
        assert sum("data.cache_gib" in problem for problem in value_problems(config)) == said
    assert remote.PIECE * 100 < 0.25 * GIB

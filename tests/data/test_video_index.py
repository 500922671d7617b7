"""Frame tables from the index of a file and from the disk: equal to those from all packets, for a fraction of the reading."""

import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_vila.data import index_cache, video_index
from megatron_vila.data.media import MediaError, open_video
from megatron_vila.data.video import VideoReader, probe_video
from megatron_vila.data.video_index import from_index, from_packets
from tests.data.stamped import numbers, write

INDEXED = {
    "H.264 with B-frames": ("mp4", {}),
    "H.264 with open groups of pictures": ("mp4", {"gop": 24, "params": "open-gop=1"}),
    "H.264 without B-frames": ("mp4", {"b_frames": 0, "gop": 12}),
    "variable rate": (
        "mp4",
        {"frames": 60, "pts_ms": np.cumsum(np.random.default_rng(0).integers(1, 400, 60)).tolist()},
    ),
    "index at the start": ("mp4", {"movflags": "faststart", "gop": 30}),
    "negative offsets": ("mp4", {"movflags": "negative_cts_offsets"}),
    "no edit list": ("mp4", {"use_editlist": "0"}),
    "an empty edit before": ("mp4", {"begin_s": 3, "gop": 20}),
    "QuickTime": ("mov", {"gop": 12}),
    "MPEG-4 with B-frames": ("mp4", {"codec": "mpeg4", "gop": 12, "b_frames": 2}),
    "HEVC with leading pictures": (
        "mp4",
        {"codec": "libx265", "frames": 60, "gop": 20, "params": "open-gop=0:radl=2:bframes=4"},
    ),
}


def indexed(path):
    container, stream = open_video(path)
    with container:
        return from_index(path, stream)


def assert_equal(one, other):
    for name in ("num_frames", "fps", "duration_s", "width", "height", "time_base", "has_pts"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("pts", "key_pts", "key_parts", "key_places", "parts", "skipped"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("name", INDEXED)
def test_the_index_of_a_file_gives_the_table_of_its_packets(tmp_path, name):
    suffix, settings = INDEXED[name]
    path = write(tmp_path / f"v.{suffix}", **({"frames": 120} | settings))
    assert_equal(indexed(path), from_packets(path))


def with_sound(path):
    """A film with a sound track, so that chunks of both alternate."""
    film = write(path.parent / "film.mp4", 120, gop=24)
    with av.open(film) as source, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(source.streams.video[0])
        sound = out.add_stream("aac", rate=8000)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                out.mux(packet)
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate = 8000
                out.mux(sound.encode(frame))
        out.mux(sound.encode())


def cut_by_an_edit_list(path):
    film = write(path.parent / "film.mp4", 120)
    with av.open(film) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        offset = int(probe_video(film).pts[50])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
                out.mux(packet)


def test_the_track_of_the_pictures_is_found_beside_one_of_sound(tmp_path):
    with_sound(tmp_path / "v.mp4")
    assert_equal(indexed(tmp_path / "v.mp4"), from_packets(tmp_path / "v.mp4"))


@pytest.mark.parametrize("make", [
    lambda path: write(path, 60, gop=12, movflags="frag_keyframe+empty_moov"),
    lambda path: os.rename(write(path.with_suffix(".mkv"), 60), path),
    cut_by_an_edit_list,
])  # fmt: skip
def test_what_the_index_does_not_tell_plainly_is_read_from_the_packets(tmp_path, make):
    path = tmp_path / "v.mp4"
    make(path)
    assert indexed(path) is None
    info = probe_video(path)
    assert_equal(info, from_packets(path))
    last = info.num_frames - 1
    assert numbers(path, [last])[0] - numbers(path, [0])[0] == last


def test_a_file_cut_after_its_index_is_found_without_reading_it(tmp_path):
    path = tmp_path / "v.mp4"
    write(path, 100, movflags="faststart")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(MediaError, match=r"cut off or corrupt: \d\d of 100 frames can be read"):
        indexed(path)


BOXES = (
    b"moov",
    b"trak",
    b"tkhd",
    b"edts",
    b"elst",
    b"mdhd",
    b"stbl",
    b"stsd",
    b"stts",
    b"ctts",
    b"stss",
    b"stsz",
    b"stsc",
    b"stco",
)


@pytest.mark.parametrize("box", BOXES)
def test_a_box_with_other_numbers_is_not_believed_alone(tmp_path, box):
    whole = Path(write(tmp_path / "whole.mp4", 40, gop=12)).read_bytes()
    start, path = whole.find(box), tmp_path / "v.mp4"
    for place in (-4, 4, 8, 12, 16, 20):
        for value in (0, 1, 2**31 - 1, 2**32 - 1):
            data = bytearray(whole)
            data[start + place : start + place + 4] = value.to_bytes(4, "big")
            path.write_bytes(data)
            tables = []
            for read in (indexed, from_packets):
                try:
                    tables.append(read(path))
                except MediaError:
                    tables.append(None)
            if tables[0] is not None:
                assert_equal(*tables)


def bytes_read(function) -> int:
    """Bytes that this process read while ``function`` ran, from files and caches alike."""

    def counter():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = counter()
    function()
    return counter() - before


def noise(frames, side=64):
    random = np.random.default_rng(0)
    return [
        np.kron(random.integers(0, 256, (side // 4, side // 4, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
        for _ in range(frames)
    ]


def test_planning_reads_the_index_and_not_the_film(tmp_path):
    path = Path(write(tmp_path / "v.mp4", 400, pictures=noise(400), params="qp=5"))
    assert path.stat().st_size > 1_000_000
    assert bytes_read(lambda: from_packets(path)) > path.stat().st_size
    assert bytes_read(lambda: probe_video(path)) < path.stat().st_size / 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "SMALLEST_FILE", 0)
    return tmp_path / "cache" / "megatron_vila" / "videos"


@pytest.fixture
def readings(monkeypatch):
    """The files whose packets were read."""
    read = []
    monkeypatch.setattr(video_index, "from_packets", lambda path: read.append(str(path)) or from_packets(path))
    return read


def test_a_table_made_from_packets_is_kept_and_shared(tmp_path, cache, readings):
    path = write(tmp_path / "v.mkv", 60, gop=12)
    barrier, found = threading.Barrier(4), []

    def probe():
        barrier.wait()
        found.append(probe_video(path))

    threads = [threading.Thread(target=probe) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert readings == [path] and len(found) == 4
    for info in (*found, probe_video(path)):
        assert_equal(info, from_packets(path))
    assert [file.suffix for file in cache.iterdir()] == [".npz"]
    assert numbers(path, [0, 33, 59], found[0]) == [0, 33, 59]


def test_a_table_of_a_file_that_has_changed_or_of_rubbish_is_made_anew(tmp_path, cache, readings):
    path = Path(write(tmp_path / "v.mkv", 60))
    probe_video(path)
    write(path, 50)
    assert probe_video(path).num_frames == 50
    for content in (b"", b"rubbish", b"PK\x03\x04" + bytes(100)):
        for file in cache.iterdir():
            file.write_bytes(content)
        assert probe_video(path).num_frames == 50
    assert len(readings) == 5


def test_a_file_that_cannot_be_used_leaves_nothing_behind(tmp_path, cache, readings):
    path = Path(write(tmp_path / "v.ts", 20))
    data = bytearray(path.read_bytes())
    data[188 * 10 : 188 * 14] = bytes(188 * 4)
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(MediaError, match="cut off or corrupt"):
            probe_video(path)
    assert len(readings) == 2 and not list(cache.iterdir())


def test_objects_in_a_kept_table_are_not_unpickled(tmp_path, cache, readings):
    path = write(tmp_path / "v.mkv", 20)
    probe_video(path)
    (file,) = cache.iterdir()
    np.savez(file, identity=np.array([{"a": 1}], dtype=object))
    assert probe_video(path).num_frames == 20 and len(readings) == 2


def test_a_folder_that_cannot_be_made_switches_keeping_off(tmp_path, cache, readings, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write(tmp_path / "v.mkv", 20)
    assert probe_video(path).num_frames == probe_video(path).num_frames == 20
    assert len(readings) == 2


SKIPPED = {
    "H.264": ("mp4", {"params": "b-pyramid=none"}),
    "H.264 with a pyramid": ("mkv", {"params": "b-pyramid=normal:b-adapt=0"}),
    "H.264 without marks of reordering": ("ts", {"params": "b-pyramid=none"}),
    "MPEG-4": ("mp4", {"codec": "mpeg4", "b_frames": 2}),
    "MPEG-2": ("ts", {"codec": "mpeg2video", "b_frames": 2}),
    "HEVC": ("mp4", {"codec": "libx265", "params": "bframes=3"}),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_leaving_out_frames_that_none_refers_to_changes_no_pixel(tmp_path, name):
    suffix, settings = SKIPPED[name]
    path = write(tmp_path / f"v.{suffix}", 60, gop=30, pictures=noise(60), **settings)
    info = probe_video(path)
    with VideoReader(info) as reader:
        every = [np.asarray(reader.frame(i)) for i in range(60)]
    for wanted in ([25], [59], [3, 4, 5], range(0, 60, 7), [1, 2, 28, 29, 30, 31, 58]):
        with VideoReader(info, list(wanted)) as reader:
            for i in wanted:
                assert np.array_equal(np.asarray(reader.frame(i)), every[i])
    with VideoReader(info, [29]) as skipping, VideoReader(info) as plain:
        skipping.frame(29), plain.frame(29)
        assert skipping.frames_decoded < plain.frames_decoded


def test_a_key_frame_without_a_time_right_after_the_first_frame_is_counted(tmp_path):
    path = tmp_path / "keys.ts"
    write(path, 8, gop=1, b_frames=0)
    content = bytearray(path.read_bytes())
    second = content.index(b"\0\0\1\xe0", content.index(b"\0\0\1\xe0") + 1)
    content[second + 7] &= 0x3F  # its PES header says that it holds no PTS
    path.write_bytes(content)
    info = probe_video(path)
    assert (info.num_frames, info.has_pts) == (8, False)
    assert numbers(path, range(8)) == list(range(8))

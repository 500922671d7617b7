"""Frames by exact index, shown on videos whose pictures carry their own number as black and white blocks."""

import os
import pickle
import threading

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.data.video import MediaError, VideoReader, decode_video_frames, probe_video
from tests.data.stamped import SIDE, number_of, numbers, stamped, write

FORMATS = {
    "h264 with B-frames, key frames 250 apart": ("mp4", {}),
    "h264 with B-frames, key frames 12 apart": ("mp4", {"gop": 12}),
    "h264 with open groups of pictures": ("mp4", {"gop": 24, "params": "open-gop=1"}),
    "mpeg4, key frames 12 apart": ("mp4", {"codec": "mpeg4", "gop": 12, "b_frames": 0}),
    "mpeg4 with B-frames": ("mp4", {"codec": "mpeg4", "gop": 12, "b_frames": 2}),
    "h264 in Matroska": ("mkv", {"gop": 48}),
    "h264 with open groups of pictures in Matroska": ("mkv", {"gop": 24, "params": "open-gop=1"}),
    "h264 in a transport stream": ("ts", {"gop": 48}),
    "h264 with B-frames in AVI": ("avi", {"gop": 48}),
    "vp9 in WebM": ("webm", {"codec": "libvpx-vp9", "b_frames": 0, "gop": 48, "frames": 120}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One file for each format, written when it is first asked for."""
    folder, written = tmp_path_factory.mktemp("videos"), {}

    def get(name):
        if name not in written:
            suffix, arguments = FORMATS[name]
            written[name] = write(folder / f"{len(written)}.{suffix}", **arguments)
        return written[name]

    return get


@pytest.mark.parametrize("name", FORMATS)
def test_each_index_gives_its_own_frame(videos, name):
    path = videos(name)
    info = probe_video(path)
    assert info.num_frames == FORMATS[name][1].get("frames", 300)
    assert info.fps == pytest.approx(24, rel=1e-3)
    assert info.duration_s == pytest.approx(info.num_frames / 24, rel=1e-3)
    assert (info.width, info.height) == (SIDE, SIDE)
    last = info.num_frames - 1
    for indices in ([0], [last], [0, last], range(last - 9, last + 1), range(40, 60), [47, 48, 49], range(0, last, 7)):
        assert numbers(path, indices, info) == list(indices)


@settings(deadline=None, max_examples=20)
@given(indices=st.lists(st.integers(0, 299), min_size=1, max_size=12))
def test_any_ascending_choice_of_frames_is_exact(videos, indices):
    for name in FORMATS:
        if "frames" not in FORMATS[name][1]:
            assert numbers(videos(name), sorted(indices)) == sorted(indices)


def test_a_variable_frame_rate_does_not_shift_the_frames(tmp_path):
    gaps = np.random.default_rng(0).integers(1, 400, 120)
    times = np.cumsum(gaps).tolist()
    path = write(tmp_path / "variable.mp4", frames=120, gop=30, pts_ms=times)
    info = probe_video(path)
    assert info.num_frames == 120
    seconds = (info.pts - info.pts[0]) * float(info.time_base)
    assert np.allclose(seconds, (np.array(times) - times[0]) / 1000, atol=1e-3)
    assert info.duration_s == pytest.approx((times[-1] - times[0]) / 1000 * 120 / 119, rel=1e-3)
    assert numbers(path, range(120)) == list(range(120))
    assert numbers(path, range(100, 110)) == list(range(100, 110))


def test_frames_cut_off_by_an_edit_list_are_not_counted_but_used_as_references(tmp_path):
    whole, cut = write(tmp_path / "whole.mp4", gop=250), str(tmp_path / "cut.mp4")
    with av.open(whole) as source, av.open(cut, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        offset = int(probe_video(whole).pts[100])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
                target.mux(packet)
    info = probe_video(cut)
    assert info.num_frames == 200
    assert numbers(cut, range(0, 200, 9), info) == list(range(100, 300, 9))
    assert numbers(cut, range(190, 200), info) == list(range(290, 300))


def test_an_empty_sample_in_the_index_is_no_missing_frame(tmp_path):
    path = tmp_path / "v.mp4"
    write(path, movflags="faststart")
    data = bytearray(path.read_bytes())
    sizes = data.find(b"stsz") + 16
    last, empty = sizes + 4 * 298, sizes + 4 * 299
    both = sum(int.from_bytes(data[place : place + 4], "big") for place in (last, empty))
    data[last : last + 4], data[empty : empty + 4] = both.to_bytes(4, "big"), bytes(4)
    path.write_bytes(data)
    info = probe_video(path)
    assert info.num_frames == 299
    assert numbers(path, range(280, 290), info) == list(range(280, 290))


def test_a_stream_that_marks_no_key_frame_is_read_from_its_start(tmp_path):
    path = write(tmp_path / "v.mp4", frames=60)
    info = probe_video(path)
    assert info.key_pts.tolist() == [info.pts[0]]
    refreshed = write(tmp_path / "refreshed.ts", frames=60, params="intra-refresh=1:keyint=20")
    assert numbers(refreshed, [7, 44, 59]) == [7, 44, 59]


def read(info, indices):
    """Numbers of the frames, frames decoded, seeks."""
    with VideoReader(info) as reader:
        return [number_of(reader.frame(i)) for i in indices], reader.frames_decoded, reader.seeks


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_late_range_is_not_decoded_from_the_start(tmp_path, suffix):
    info = probe_video(write(tmp_path / f"long.{suffix}", frames=600, gop=50))
    wanted = list(range(510, 530))
    found, decoded, seeks = read(info, wanted)
    assert found == wanted
    assert decoded <= 80  # from the key frame at 500, or from the one before where the container seeks by decoding time
    assert seeks == 1


def test_there_is_no_seek_while_no_key_frame_lies_ahead(tmp_path):
    info = probe_video(write(tmp_path / "long.mp4", frames=600, gop=250))
    found, decoded, seeks = read(info, range(260, 480, 3))
    assert found == list(range(260, 480, 3))
    assert seeks == 1
    assert 228 <= decoded <= 228 + 16  # 250..477 once, and what the decoder holds back for reordering
    assert read(info, range(0, 240, 40))[2] == 0
    found, decoded, seeks = read(info, [5, 100, 240, 255, 490, 505])
    assert found == [5, 100, 240, 255, 490, 505]
    assert seeks <= 2 and decoded <= 241 + 241 + 6


def test_far_apart_frames_skip_the_groups_of_pictures_between_them(tmp_path):
    info = probe_video(write(tmp_path / "long.mp4", frames=600, gop=12))
    wanted = [3, 120, 121, 300, 598]
    found, decoded, seeks = read(info, wanted)
    assert found == wanted
    assert seeks == 3
    assert decoded <= 5 * 12 + 5 * 4


def test_repeated_indices_repeat_the_picture_and_none_gives_none(videos):
    path = videos("h264 with B-frames, key frames 12 apart")
    assert numbers(path, [3, 3, 3, 40]) == [3, 3, 3, 40]
    assert decode_video_frames(path, []) == []


@pytest.mark.parametrize("indices", [[5, 3], [300], [-1]])
def test_indices_that_do_not_ascend_or_do_not_exist_are_refused(videos, indices):
    with pytest.raises(ValueError, match=r"ascend|frames 0\.\.299"):
        decode_video_frames(videos("h264 with B-frames, key frames 12 apart"), indices)


def test_a_cover_picture_is_not_taken_for_the_video(tmp_path):
    film, path = write(tmp_path / "film.mp4", frames=20), str(tmp_path / "covered.mp4")
    with av.open(film) as source, av.open(path, "w") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.width = cover.height = SIDE
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = target.add_stream_from_template(source.streams.video[0])
        target.mux(cover.encode(av.VideoFrame.from_ndarray(stamped(0), format="rgb24")))
        target.mux(cover.encode())
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                target.mux(packet)
    assert probe_video(path).num_frames == 20
    assert numbers(path, [7, 19]) == [7, 19]


def test_many_threads_decode_the_same_file_at_once(videos):
    path = videos("h264 with B-frames, key frames 12 apart")
    found = {}

    def decode(start):
        found[start] = numbers(path, range(start, start + 20))

    threads = [threading.Thread(target=decode, args=(start,)) for start in (0, 90, 200, 280)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: list(range(start, start + 20)) for start in (0, 90, 200, 280)}


def test_containers_are_closed_after_use_and_after_a_failure(tmp_path):
    path = write(tmp_path / "whole.mp4", frames=30)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 100)
    for _ in range(5):
        decode_video_frames(path, [3, 20])
        with pytest.raises(MediaError):
            probe_video(broken)
    open_files = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not [f for f in open_files if f.endswith(".mp4")]


def audio_only(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def without_frames(path):
    with av.open(str(path), "w", options={"movflags": "empty_moov"}) as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        out.start_encoding()


def cut_off(path, movflags=""):
    write(path, **({"movflags": movflags} if movflags else {}))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


BROKEN = {
    "missing": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "not a video": (lambda path: path.write_bytes(os.urandom(4000)), "not a video that can be read"),
    "a folder": (lambda path: path.mkdir(), "not a regular file but a folder"),
    "sound without pictures": (audio_only, "no video stream"),
    "without frames": (without_frames, "holds no frame"),
    "cut off before its index": (cut_off, "not a video that can be read"),
    "cut off after its index": (lambda path: cut_off(path, "faststart"), r"cut off or corrupt: \d+ of 300 frames"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_media_error_that_names_the_file_and_the_reason(tmp_path, name):
    make, reason = BROKEN[name]
    path = tmp_path / "broken.mp4"
    make(path)
    for use in (probe_video, lambda p: decode_video_frames(p, [0])):
        with pytest.raises(MediaError, match=reason) as caught:
            use(path)
        assert caught.value.path == str(path)
        assert str(path) in str(caught.value)


def test_frames_that_cannot_be_decoded_are_a_media_error(tmp_path):
    path = tmp_path / "damaged.mp4"
    info = probe_video(write(path, frames=120, gop=30))
    data = bytearray(path.read_bytes())
    start = data.find(b"mdat") + 4
    data[start + 1200 : start + 2600] = bytes(1400)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"frame \d+ of 120|decoding frame"):
        decode_video_frames(path, range(120), info)


def test_a_video_that_vanishes_after_the_probe_is_a_media_error(tmp_path):
    path = tmp_path / "gone.mp4"
    info = probe_video(write(path, frames=10))
    path.unlink()
    with pytest.raises(MediaError, match="no such file"):
        decode_video_frames(path, [3], info)


def test_a_media_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(MediaError("a/b.mp4", "cut off")))
    assert (error.path, error.reason, str(error)) == ("a/b.mp4", "cut off", "a/b.mp4: cut off")

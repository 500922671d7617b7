"""Videos joined byte by byte, or cut out of longer ones without encoding: each frame that can be shown, in order."""

import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_vila.data import media
from megatron_vila.data.video import MediaError, VideoReader, decode_video_frames, probe_video
from tests.data.stamped import number_of, numbers, write

MPEG2 = {"codec": "mpeg2video", "b_frames": 2}
JOINED = {
    "MPEG-2 program streams": ("vob", MPEG2),
    "H.264 program streams": ("vob", {}),
    "MPEG-2 transport streams": ("ts", MPEG2),
    "H.264 transport streams": ("ts", {}),
}


def join(path, *parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def parts(tmp_path, suffix, settings, begins_s=(0, 0), frames=(60, 40)):
    """Videos of ``frames`` frames, numbered through, that begin at ``begins_s``."""
    firsts = np.cumsum([0, *frames]).tolist()
    return [
        Path(write(tmp_path / f"{n}.{suffix}", frames[n], gop=24, first=firsts[n], begin_s=begins_s[n], **settings))
        for n in range(len(frames))
    ]


@pytest.mark.parametrize("name", JOINED)
def test_joined_streams_hold_the_frames_of_all_their_parts(tmp_path, name):
    path = join(tmp_path / "joined", *parts(tmp_path, *JOINED[name]))
    info = probe_video(path)
    assert info.num_frames == 100 and info.fps == pytest.approx(24)
    assert numbers(path, range(100), info) == list(range(100))
    assert numbers(path, [3, 59, 60, 61, 99], info) == [3, 59, 60, 61, 99]
    assert numbers(path, [77], info) == [77]
    assert np.allclose(info.seconds, np.arange(100) / 24)


@pytest.mark.parametrize("begins_s", [(3600, 0), (0, 3600), (7, 3)])
def test_time_stamps_that_jump_do_not_change_rate_and_frames(tmp_path, begins_s):
    path = join(tmp_path / "joined", *parts(tmp_path, "ts", {}, begins_s))
    info = probe_video(path)
    assert info.num_frames == 100 and info.fps == pytest.approx(24)
    assert numbers(path, [0, 30, 59, 60, 80, 99], info) == [0, 30, 59, 60, 80, 99]


@pytest.mark.parametrize("begins_s", [(0, 0), (3600, 0), (0, 3600)])
def test_a_joined_transport_stream_is_entered_at_its_key_frames(tmp_path, begins_s):
    path = join(tmp_path / "joined", *parts(tmp_path, "ts", {}, begins_s, frames=(100, 150)))
    info = probe_video(path)
    for wanted in ([30], [99], [100], [130], [249], [50, 51, 120, 240], [99, 100]):
        with VideoReader(info) as reader:
            assert [number_of(reader.frame(i)) for i in wanted] == wanted
            assert reader.frames_decoded <= 40 * len(wanted)


@pytest.mark.parametrize("suffix", ["mpg", "vob", "wmv"])
@pytest.mark.parametrize(
    "settings", [MPEG2, {"codec": "mpeg1video", "b_frames": 2}, {}], ids=["MPEG-2", "MPEG-1", "H.264"]
)
def test_each_index_of_a_container_without_all_times_gives_its_own_frame(tmp_path, settings, suffix):
    path = write(tmp_path / f"v.{suffix}", 100, gop=12, **settings)
    info = probe_video(path)
    assert info.num_frames == 100 and info.fps == pytest.approx(24, rel=0.05)
    for wanted in ([0], [50], [99], [13, 47, 48, 80]):
        assert numbers(path, wanted, info) == wanted


def test_time_stamps_that_wrap_at_33_bits_go_on(tmp_path):
    path = write(tmp_path / "wrap.ts", 100, gop=24, begin_s=2**33 // 90000 - 2)
    info = probe_video(path)
    assert info.num_frames == 100 and info.fps == pytest.approx(24)
    assert numbers(path, [0, 47, 48, 49, 99], info) == [0, 47, 48, 49, 99]
    assert numbers(path, [70], info) == [70]


def test_a_part_that_begins_between_key_frames_is_used_from_its_first_one(tmp_path):
    first, second = parts(tmp_path, "ts", {}, frames=(40, 60))
    with av.open(str(second)) as container:
        packets = [p.pos for p in container.demux(video=0) if p.size]
    second.write_bytes(second.read_bytes()[packets[10] :])
    path = join(tmp_path / "joined", first, second)
    info = probe_video(path)
    found = numbers(path, range(info.num_frames), info)
    assert found == [*range(40), *range(64, 100)]


def test_a_part_of_another_size_is_used_and_one_over_the_budget_is_not(tmp_path, monkeypatch):
    small = Path(write(tmp_path / "small.ts", 20, gop=10))
    large = Path(write(tmp_path / "large.ts", 20, gop=10, first=20, side=128))
    path = join(tmp_path / "joined.ts", small, large)
    pictures = decode_video_frames(path, [5, 25])
    assert [picture.size for picture in pictures] == [(64, 64), (128, 128)]
    assert numbers(path, [5, 25]) == [5, 25]
    monkeypatch.setattr(media, "MAX_PIXELS", 100 * 100)
    assert numbers(path, [5]) == [5]
    with pytest.raises(MediaError, match="frame 25|decoding frame"):
        decode_video_frames(path, [5, 25])


def cut(source, target, packet):
    """Copy the packets of ``source`` from number ``packet`` on."""
    with av.open(source) as whole, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(whole.streams.video[0])
        packets = [p for p in whole.demux(video=0) if p.size][packet:]
        begin = packets[0].dts if packets[0].dts is not None else packets[0].pts
        for p in packets:
            p.pts, p.dts, p.stream = p.pts - begin, None if p.dts is None else p.dts - begin, stream
            out.mux(p)
    return str(target)


OPEN = {
    "H.264": ({"params": "open-gop=1"}, 24),
    "HEVC": ({"codec": "libx265", "params": "open-gop=1"}, 24),
    "MPEG-2": (MPEG2, 24),
}


@pytest.mark.parametrize(
    ("name", "suffix"), [*itertools.product(OPEN, ["mkv", "mp4"]), ("MPEG-2", "vob"), ("MPEG-2", "ts")]
)
def test_pictures_at_the_start_that_cannot_be_decoded_are_no_frames(tmp_path, name, suffix):
    settings, gop = OPEN[name]
    whole = write(tmp_path / f"whole.{suffix}", 72, gop=gop, **settings)
    with av.open(whole) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    key = next(i for i, p in enumerate(packets) if i and p.is_keyframe)
    assert any(p.pts < packets[key].pts for p in packets[key + 1 : key + 4])  # an open group of pictures
    for start in (key, key - 5):
        path = cut(whole, tmp_path / f"cut{start}.{suffix}", start)
        info = probe_video(path)
        assert numbers(path, range(info.num_frames), info) == list(range(24, 72))
        assert numbers(path, [0, 30], info) == [24, 54]


def test_leading_pictures_that_can_be_decoded_are_frames(tmp_path):
    whole = write(tmp_path / "whole.mkv", 60, codec="libx265", gop=24, params="open-gop=0:radl=2:bframes=4")
    with av.open(whole) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    key = next(i for i, p in enumerate(packets) if i and p.is_keyframe)
    leading = sum(p.pts < packets[key].pts for p in packets[key + 1 : key + 6])
    assert leading == 2
    path = cut(whole, tmp_path / "cut.mkv", key)
    info = probe_video(path)
    found = numbers(path, range(info.num_frames), info)
    assert found == list(range(found[0], 60)) and len(found) == len(packets) - key

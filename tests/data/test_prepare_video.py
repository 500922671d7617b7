"""Videos prepared for training: the frames that training reads from the source, at the same seconds, upright and small."""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.clips import picture_files, take_frames
from megatron_vila.data.fields import Media
from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaError
from megatron_vila.data.prepare.frames import keep_frames
from megatron_vila.data.prepare.medium import prepare_medium
from megatron_vila.data.prepare.options import Options
from megatron_vila.data.prepare.transcode import encoded_size
from megatron_vila.data.sampling import sample_frame_indices
from megatron_vila.data.video import decode_video_frames, probe_video
from tests.data.stamped import number_of, numbers, stamped, write
from tests.data.test_sampling import timed

SMALL = Options(short_side=64)


def screen_ms():
    """A second of 20 frames, then one frame for 3.3 s, then 10 frames a second with a shake, as a screen recorder writes."""
    rest = 4300 + np.arange(20) * 100 + np.random.default_rng(1).integers(0, 60, 20)
    return [*range(0, 1000, 50), *rest.tolist()]


SOURCES = {
    "24 a second": ("a.mp4", {"frames": 75}),
    "29.97 a second": ("b.mp4", {"frames": 91, "rate": Fraction(30000, 1001), "gop": 30}),
    "milliseconds, beginning late": ("c.mkv", {"frames": 100, "rate": 30, "begin_s": 7}),
    "variable": ("d.mp4", {"frames": 40, "pts_ms": screen_ms()}),
    "transport stream": ("e.ts", {"frames": 60, "rate": 25}),
    "no times": ("f.avi", {"frames": 50, "codec": "mpeg4", "b_frames": 0}),
    "slower than is kept": ("g.mp4", {"frames": 5, "rate": 1}),
    "one frame": ("h.mp4", {"frames": 1}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {name: write(folder / file, **given) for name, (file, given) in SOURCES.items()}


@pytest.fixture
def prepare(tmp_path):
    """Prepares a medium and gives the path of its file and what became of it."""

    def prepared(medium, options=SMALL):
        medium = medium if isinstance(medium, Media) else Media(str(medium), True)
        outcome = prepare_medium(medium, options, str(tmp_path))
        return outcome.files[0][1], outcome

    return prepared


def content(path):
    return Path(path).read_bytes()


def taken(path, medium=None, **data):
    """Numbers and seconds of the frames that training takes of a video by the settings ``data``."""
    medium, info = medium or Media(str(path), True), probe_video(path)
    indices, _ = take_frames(medium, DataConfig(num_frames=1000, **data), lambda _: info, picture_files)
    return numbers(path, indices, info), info.seconds[indices] - info.seconds[indices[0]]


@pytest.mark.parametrize("name", SOURCES)
def test_training_takes_the_same_frames_of_the_same_seconds_from_the_source_and_from_what_is_prepared(name, sources, prepare):
    file, outcome = prepare(sources[name])
    for fps in (2.0, 1.0):
        (shown, at_s), (expected, expected_s) = (taken(each, fps=fps, fps_rule="first") for each in (file, sources[name]))
        assert shown == expected
        assert np.abs(at_s - expected_s).max() <= 1e-6
    info = probe_video(file)
    assert outcome.frames == info.num_frames == len(taken(sources[name], fps=2.0, fps_rule="first")[0])
    assert len(info.key_pts) == info.num_frames  # every frame can be had alone
    assert outcome.psnr > 30 and not outcome.poor


def test_every_frame_of_a_source_can_be_kept(sources, prepare):
    name = "variable"
    file, _ = prepare(sources[name], Options(short_side=64, fps=0, key_distance=10))
    assert numbers(file, range(40)) == list(range(40))
    assert np.abs(probe_video(file).seconds - np.array(screen_ms()) / 1000).max() < 1e-9
    assert len(probe_video(file).key_pts) == 4


@settings(deadline=None)
@given(rate=st.sampled_from([24, 25, 30000 / 1001, 60]), frames=st.integers(2, 4000), count=st.integers(1, 400))
def test_frames_spread_over_a_prepared_video_lie_close_to_those_of_the_source(rate, frames, count):
    """They are other frames: of 2 a second not every moment is kept. How far off is what docs/prepare_data.md says."""
    raw = timed(np.arange(frames) / rate)
    kept = raw.seconds[sample_frame_indices(raw, 10**6, 2.0, "first")]
    places = sample_frame_indices((len(kept), 2.0), count)
    if len(places) == count:
        off_s = raw.seconds[sample_frame_indices(raw, count)] - kept[places]
        assert np.abs(off_s).max() <= 1.5 / 2.0


@pytest.mark.parametrize(("start_s", "end_s"), [(0.7, 2.2), (None, 1.0), (1.26, None), (1.0, 1.01)])
def test_a_clip_is_cut_out_and_its_seconds_count_from_its_first_frame(start_s, end_s, sources, prepare):
    for name in ("24 a second", "milliseconds, beginning late", "variable"):
        clip = Media(sources[name], True, start_s, end_s)
        file, outcome = prepare(clip)
        shown, at_s = taken(file, fps=2.0, fps_rule="first")
        expected, expected_s = taken(sources[name], clip, fps=2.0, fps_rule="first")
        assert shown == expected and np.abs(at_s - expected_s).max() <= 1e-6
        assert outcome.seconds == pytest.approx(expected_s[-1], abs=1e-6)


def test_a_picture_that_stands_for_hours_keeps_its_time():
    """As arithmetic: no file is written."""
    from megatron_vila.data.prepare.frames import _as_they_are, _in_ticks

    pts, unit = _as_they_are(np.array([0, 7200 * 90_000 + 7, 7200 * 90_000 + 45_007]), Fraction(1, 90_000))
    assert unit == Fraction(1, 90_000) and pts[1] == 7200 * 90_000 + 7
    pts, unit = _as_they_are(np.array([0, 7200 * 10**6 + 13, 7201 * 10**6]), Fraction(1, 10**6))
    assert unit == Fraction(1, 90_000) and pts.tolist() == [0, 7200 * 90_000 + 1, 7201 * 90_000]
    hour = [i / Fraction(30000, 1001) for i in range(0, 108_000, 15)]
    pts, unit = _in_ticks(hour)
    assert unit == Fraction(1, 10**6) and all(0 <= s - p * unit < unit for s, p in zip(hour, pts.tolist(), strict=True))


def turned(path, out, matrix):
    """The same video with a display matrix (a, b, c, d)."""
    file = bytearray(content(path))
    place = file.index(b"tkhd") + 4 + 40  # version 0: the matrix stands after 40 bytes
    a, b, c, d = (value * 65536 for value in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 2**30], dtype=">i4")
    file[place : place + 36] = values.tobytes()
    out.write_bytes(file)
    return str(out)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, 1), (0, -1, -1, 0)], ids=["rotated", "mirrored", "both"])
def test_rotated_and_mirrored_videos_stand_upright(matrix, sources, prepare, tmp_path):
    source = turned(sources["24 a second"], tmp_path / "turned.mp4", matrix)
    upright = decode_video_frames(source, [12])[0]
    assert number_of(upright) != 12  # the matrix is there
    file, outcome = prepare(source)
    (shown,) = decode_video_frames(file, [1])
    assert np.abs(np.asarray(shown, float) - np.asarray(upright)).mean() < 3
    assert outcome.psnr > 30


def test_odd_sizes_become_even_and_small_videos_are_not_blown_up(tmp_path, prepare):
    path = tmp_path / "odd.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 101, 75, "yuv444p"
        for i in range(8):
            picture = np.asarray(Image.fromarray(stamped(i)).resize((101, 75), Image.Resampling.NEAREST))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    file, outcome = prepare(path, Options(short_side=384))
    assert (outcome.width, outcome.height) == (102, 76)
    assert (probe_video(file).width, probe_video(file).height) == (102, 76)
    assert outcome.psnr > 25
    assert encoded_size(1920, 1080, 384) == (682, 384)
    assert encoded_size(1080, 1920, 384) == (384, 682)
    assert encoded_size(3, 2, 384) == (4, 2)
    assert encoded_size(40_000, 400, 384) == (16_384, 164)


def test_colors_stay_what_they_are(tmp_path, prepare):
    corners = np.array([[[230, 30, 30], [30, 220, 40]], [[40, 40, 230], [230, 220, 30]]], dtype=np.uint8)
    picture = np.asarray(Image.fromarray(corners).resize((64, 64), Image.Resampling.BICUBIC))
    source = write(tmp_path / "colors.mp4", frames=3, rate=2, pictures=[picture] * 3)
    file, outcome = prepare(source)
    before, after = (np.asarray(decode_video_frames(path, [1])[0], float) for path in (source, file))
    assert np.abs(after - before).mean() < 2
    assert outcome.psnr > 35


def test_the_same_source_gives_the_same_bytes(sources, tmp_path):
    contents = set()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        outcome = prepare_medium(Media(sources["29.97 a second"], True), SMALL, str(tmp_path / place))
        contents.add(content(outcome.files[0][1]))
    assert len(contents) == 1


def test_a_medium_that_is_there_is_not_made_again_unless_its_source_changed(sources, tmp_path):
    source = tmp_path / "v.mp4"
    source.write_bytes(content(sources["24 a second"]))
    first = prepare_medium(Media(str(source), True), SMALL, str(tmp_path))
    marked = first.files[0][1]
    Path(marked).write_bytes(content(marked)[:-4] + b"mark")
    assert prepare_medium(Media(str(source), True), SMALL, str(tmp_path)) == first
    assert content(marked).endswith(b"mark")
    source.write_bytes(content(sources["29.97 a second"]))
    again = prepare_medium(Media(str(source), True), SMALL, str(tmp_path))
    assert again.seconds != first.seconds and not content(marked).endswith(b"mark")


@pytest.mark.parametrize("name, size", [("medium.json", 0), ("0.mp4", 0), ("0.mp4", 100)])
def test_a_medium_that_is_not_whole_after_a_loss_of_power_is_made_again(sources, tmp_path, name, size):
    medium = Media(sources["29.97 a second"], True)
    first = prepare_medium(medium, SMALL, str(tmp_path))
    made = first.files[0][1]
    whole = content(made)
    os.truncate(Path(made).with_name(name), size)
    assert prepare_medium(medium, SMALL, str(tmp_path)) == first
    assert content(made) == whole


def test_a_video_that_came_out_poorly_is_told_or_taken_as_it_is(tmp_path, prepare):
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    path = write(tmp_path / "noise.mp4", frames=6, rate=2, pictures=noise)
    coarse = {"short_side": 64, "crf": 51}
    file, outcome = prepare(path, Options(**coarse))
    assert outcome.poor and outcome.psnr < 30 and outcome.kind == "video"
    (tmp_path / "again").mkdir()
    kept = prepare_medium(Media(path, True), Options(**coarse, poor="original"), str(tmp_path / "again"))
    assert kept.kind == "original" and kept.poor
    assert content(kept.files[0][1]) == content(path)


def test_broken_videos_are_refused_and_leave_nothing_behind(sources, tmp_path, prepare):
    whole = content(sources["24 a second"])
    for name, damaged in {"cut.mp4": whole[: len(whole) // 2], "empty.mp4": b"", "text.mp4": b"no video" * 99}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(MediaError, match=name):
            prepare(tmp_path / name)
    with pytest.raises(MediaError, match=r"gone\.mp4"):
        prepare(tmp_path / "gone.mp4")
    with pytest.raises(MediaError, match="the clip starts at 99 s"):
        prepare(Media(sources["24 a second"], True, 99.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.mp4", "empty.mp4", "text.mp4"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(12):
        Image.fromarray(stamped(i, 128)).save(tmp_path / "frames" / f"{i}.png")
    return str(tmp_path / "frames")


def test_pictures_with_a_rate_become_a_video(folder, prepare):
    file, outcome = prepare(Media(folder, True, fps=4.0))
    assert outcome.kind == "video" and numbers(file, range(6)) == [0, 2, 4, 6, 8, 10]
    assert probe_video(file).seconds.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_pictures_without_a_rate_stay_pictures(folder, prepare):
    _, outcome = prepare(Media(folder, True))
    assert outcome.kind == "pictures" and outcome.frames == len(outcome.files) == 12
    assert [number_of(load_image(path)) for _, path in outcome.files] == list(range(12))
    assert (outcome.width, outcome.height) == (64, 64)
    assert {ending for ending, _ in outcome.files} == {"jpg"}


def test_a_picture_keeps_its_bytes_up_to_a_limit(tmp_path, prepare):
    picture = Image.fromarray(stamped(77, 128))
    for ending in ("jpg", "png", "webp"):
        picture.save(tmp_path / f"p.{ending}")
        file, outcome = prepare(Media(str(tmp_path / f"p.{ending}"), False))
        assert content(file) == (tmp_path / f"p.{ending}").read_bytes()
        assert outcome.files[0][0] == ending and outcome.psnr is None
    picture.save(tmp_path / "p.bmp")
    file, outcome = prepare(Media(str(tmp_path / "p.bmp"), False))
    assert outcome.files[0][0] == "png" and np.array_equal(np.asarray(load_image(file)), np.asarray(picture))
    (tmp_path / "small").mkdir()
    few = prepare_medium(Media(str(tmp_path / "p.png"), False), Options(picture_side=64), str(tmp_path / "small"))
    assert (few.width, few.height) == (64, 64) and number_of(load_image(few.files[0][1])) == 77
    (tmp_path / "broken.png").write_bytes((tmp_path / "p.png").read_bytes()[:200])
    with pytest.raises(MediaError, match="broken"):
        prepare(Media(str(tmp_path / "broken.png"), False))


def test_what_is_kept_is_chosen_without_decoding(sources):
    kept = keep_frames(Media(sources["24 a second"], True), 2.0)
    assert kept.indices.tolist() == [0, 12, 24, 36, 48, 60, 72]
    assert json.dumps(kept.pts.tolist())

"""Which frames are taken: VILA's two rules to the letter at a constant rate, and by time where the rate varies."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.data.sampling import sample_frame_indices, thin_out
from megatron_vila.data.video import VideoInfo, probe_video
from tests.data.stamped import numbers, write


@settings(deadline=None)
@given(total=st.integers(1, 5000), wanted=st.integers(1, 300))
def test_uniform_sampling_spreads_frames_from_the_first_to_the_last(total, wanted):
    indices = sample_frame_indices((total, 24.0), wanted)
    assert len(indices) == min(total, wanted)
    assert indices[0] == 0 and (len(indices) == 1 or indices[-1] == total - 1)
    assert (np.diff(indices) > 0).all()
    assert np.ptp(np.diff(indices)) <= 1 if len(indices) > 1 else True


@settings(deadline=None)
@given(total=st.integers(1, 5000), rate=st.floats(1, 60), wanted=st.integers(1, 300), fps=st.floats(0.1, 60))
def test_a_limit_of_frames_per_second_thins_short_videos_and_leaves_long_ones(total, rate, wanted, fps):
    indices = sample_frame_indices((total, rate), wanted, fps)
    duration_s = total / rate
    if duration_s >= wanted / fps:
        assert len(indices) == min(wanted, total)
    else:
        assert len(indices) == min(max(2, int(duration_s * fps)), wanted, total)
    assert indices[0] == 0 and (np.diff(indices) > 0).all() and indices[-1] < total


@pytest.mark.parametrize(
    ("video", "wanted", "fps"), [((0, 24.0), 4, 0), ((10, 24.0), 0, 0), ((10, 24.0), 4, -1), ((10, 0.0), 4, 1)]
)
def test_sampling_that_makes_no_sense_is_refused(video, wanted, fps):
    with pytest.raises(ValueError, match="fps"):
        sample_frame_indices(video, wanted, fps)


@settings(deadline=None)
@given(st.integers(1, 500), st.data())
def test_thinned_frames_are_distinct_and_within_the_video(frames, data):
    count = data.draw(st.integers(1, frames))
    thin = thin_out(np.arange(frames), count)
    assert (
        len(np.unique(thin)) == count and thin[0] == 0 and thin[-1] == (frames - 1 if count > 1 or frames == 1 else 0)
    )


def timed(seconds, per_second=90000) -> VideoInfo:
    """A table of frames at ``seconds``."""
    pts = np.round(np.asarray(seconds) * per_second).astype(np.int64)
    fps = (len(pts) - 1) / (pts[-1] - pts[0]) * per_second
    none = np.zeros(1, dtype=np.int64)
    return VideoInfo(
        source="v",
        num_frames=len(pts),
        fps=fps,
        duration_s=len(pts) / fps,
        width=64,
        height=64,
        time_base=Fraction(1, per_second),
        pts=pts,
        key_pts=pts[:1],
        has_pts=True,
        key_parts=none,
        key_places=none,
        parts=np.array([0, len(pts)]),
        skipped=none,
    )


def longvila(frames, rate, num_frames, fps):
    """``opencv_extract_frames`` of LongVILA's branch: the numbers of the frames."""
    duration = frames / rate
    if duration >= num_frames / fps:
        return np.linspace(0, frames - 1, num_frames, dtype=int).tolist()
    return np.linspace(0, frames - 1, max(2, int(duration * fps)), dtype=int).tolist()


def vila_main(frames, rate, num_frames, fps, lost_s=0.0):
    """``_load_video`` of VILA's main branch: the numbers of the frames. ``lost_s``: what a time loses there as a float."""
    timestamps = np.arange(0, frames / rate, 1.0 / fps)[:num_frames]
    return [int((t + lost_s) * rate) for t in timestamps]


@settings(deadline=None)
@given(
    frames=st.integers(2, 3000),
    rate=st.sampled_from([8, 24, 25, 29.97, 60]),
    wanted=st.integers(2, 200),
    fps=st.sampled_from([0.5, 1, 2, 3.7]),
)
def test_at_a_constant_rate_the_frames_are_those_of_the_official_code(frames, rate, wanted, fps):
    for rule, official in (("spread", longvila), ("first", vila_main)):
        expected = sorted({i for i in official(frames, rate, wanted, fps) if i < frames})
        assert sample_frame_indices((frames, rate), wanted, fps, rule).tolist() == expected
        video = timed(np.arange(frames) / rate, per_second=1000)  # rounded to milliseconds, as in Matroska
        if math.isclose(video.fps, rate, rel_tol=1e-12):
            if rule == "first":  # where times are known, a frame that begins at the very moment is shown then
                expected = sorted({i for i in vila_main(frames, rate, wanted, fps, lost_s=1e-6) if i < frames})
            assert sample_frame_indices(video, wanted, fps, rule).tolist() == expected


def scroll_then_still():
    """300 frames in the first 10 s, then one a second for 90 s, as a screen recorder writes them."""
    return np.concatenate([np.arange(300) / 30, 10 + np.arange(90)])


@pytest.mark.parametrize("rule", ["spread", "first"])
def test_a_variable_rate_is_sampled_in_time(rule):
    seconds = scroll_then_still()
    taken = seconds[sample_frame_indices(timed(seconds), 500, 2.0, rule)]
    early, late = taken[taken < 10], taken[taken >= 10]
    assert len(early) == 20 and np.abs(np.diff(early) - 0.5).max() < 0.05
    assert 89 <= len(late) <= 90 and np.diff(late).max() <= 2
    assert taken[0] == 0


def test_the_first_frames_of_a_variable_rate_are_those_shown_at_the_asked_times():
    seconds = scroll_then_still()
    found = sample_frame_indices(timed(seconds), 24, 2.0, "first")
    expected = {max(i for i, s in enumerate(seconds) if s <= n / 2 + 1e-9) for n in range(24)}
    assert set(found.tolist()) == expected and len(found) == 22  # 10.5 s and 11.5 s show what 10 s and 11 s show


@pytest.mark.parametrize(
    ("rate", "per_second"), [(24, 12288), (25, 12800), (30, 15360), (Fraction(30000, 1001), 30000), (60, 90000)]
)
def test_what_is_shown_at_a_moment_does_not_hang_on_the_rounding_of_floats(rate, per_second):
    """A frame that begins at the very moment is shown then; of the frames that are taken alone, the same are taken."""
    video = timed([float(Fraction(i) / rate) for i in range(2000)], per_second)
    for fps in (2, 3, 5):
        count = math.floor(2000 / rate * fps)
        taken = sample_frame_indices(video, count, fps, "first")
        assert taken.tolist() == [math.floor(Fraction(n, fps) * rate) for n in range(count)]
        kept = timed(video.seconds[taken], per_second)
        assert sample_frame_indices(kept, count, fps, "first").tolist() == list(range(count))


def test_a_video_thinned_out_in_time_stays_even_in_time():
    seconds = scroll_then_still()
    thin = thin_out(np.arange(390), 10, seconds)
    assert np.diff(seconds[thin]).max() - np.diff(seconds[thin]).min() <= 1
    assert thin_out(np.arange(390), 10).tolist() == np.round(np.linspace(0, 389, 10)).tolist()


def test_a_rate_is_held_on_a_real_file_with_a_variable_rate(tmp_path):
    times_ms = [*range(0, 2000, 50), *range(2000, 12000, 1000)]
    path = write(tmp_path / "screen.mp4", len(times_ms), gop=20, pts_ms=times_ms)
    info = probe_video(path)
    taken = sample_frame_indices(info, 100, 2.0)
    assert [times_ms[i] for i in numbers(path, taken, info)] == [times_ms[i] for i in taken]
    assert sum(times_ms[i] < 2000 for i in taken) == 4 and sum(times_ms[i] >= 2000 for i in taken) >= 9


def test_sampling_takes_the_table_of_a_probed_video(tmp_path):
    info = probe_video(write(tmp_path / "v.mp4", gop=12))
    assert sample_frame_indices(info, 5).tolist() == [0, 75, 150, 224, 299]
    assert sample_frame_indices(info, 100, fps=2.0).tolist() == np.linspace(0, 299, 25).astype(int).tolist()
    assert sample_frame_indices(info, 10, fps=2.0, rule="first").tolist() == list(range(0, 120, 12))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="fps_rule=last is unknown; use one of spread, first"):
        sample_frame_indices((10, 24.0), 4, 1.0, "last")

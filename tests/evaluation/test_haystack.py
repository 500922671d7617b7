"""Haystacks and needles: which frames are taken, where the needle's picture stands, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_vila.data.images import load_image
from megatron_vila.data.media import MediaError
from megatron_vila.data.synthetic import ANSWERS, COLORS, write_needle_set, write_video
from megatron_vila.data.video import decode_video_frames
from megatron_vila.data.video_index import probe_video
from megatron_vila.evaluation.haystack import (
    HaystackError,
    digest_of_haystack,
    digest_of_needles,
    needle_frame,
    open_haystack,
    read_needles,
)
from megatron_vila.plan.pictures import Unit

UNIT = Unit(frames=1, tiles=1, tokens=4, cost=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_needle_set(tmp_path_factory.mktemp("needles"), 12, 9)


def gray_video(path, frames, fps):
    clip = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 4, 3, axis=3)
    write_video(path, iter([np.broadcast_to(clip, (frames, 32, 32, 3))]), 32, fps)
    return path


def close_to(color, pixels):
    return (np.abs(np.asarray(pixels).astype(int) - COLORS[color]).max(-1) < 50).sum()


def test_in_a_synthetic_haystack_nothing_flashes_and_each_needle_shows_its_answer(made):
    haystack, needles = made
    frames = list(decode_video_frames(haystack, range(probe_video(haystack).num_frames)))
    assert len(frames) == 12 and max(close_to(color, frame) for frame in frames for color in COLORS) < 40
    found = read_needles(needles)
    assert [needle.answer for needle in found] == [*ANSWERS["colour"], ANSWERS["colour"][0]]
    for needle in found:
        assert close_to(needle.answer, load_image(needle.picture)) > 40 and "colour" in needle.question


def test_a_longer_synthetic_haystack_begins_alike(made, tmp_path):
    longer, _ = write_needle_set(tmp_path, 24, 1)
    pictures = [np.asarray(list(decode_video_frames(path, range(12)))).astype(int) for path in (made[0], longer)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 3


def test_the_first_frames_are_taken_at_the_rate_asked_for(tmp_path):
    video = gray_video(tmp_path / "gray.mp4", 48, fps=8)
    assert open_haystack(video, 1, 5).indices.tolist() == [0, 8, 16, 24, 32]
    assert open_haystack(video, 4, 5).indices.tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(HaystackError, match=r"has 6 frames at --fps 1, .* needs 7 .*lasts 6 s"):
        open_haystack(video, 1, 7)
    with pytest.raises(HaystackError, match="--fps 0"):
        open_haystack(video, 0, 1)


def test_pictures_of_a_folder_are_taken_in_natural_order(tmp_path):
    for number in (1, 2, 10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    haystack = open_haystack(tmp_path, 1, 3)
    assert [haystack.frame(i, UNIT).pictures for i in range(3)] == [(str(tmp_path / f"{n}.png"),) for n in (1, 2, 10)]
    with pytest.raises(HaystackError, match="has 3 frames, .* needs 4"):
        open_haystack(tmp_path, 1, 4)


def test_what_is_no_haystack_is_told(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "text.mp4", tmp_path / "none.mp4"):
        with pytest.raises(MediaError, match=path.name):
            open_haystack(path, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "cannot be read"),
        ("[]", "not a JSON list of at least one"),
        ('{"image": "a.png"}', "not a JSON list"),
        ("[3]", "needle 0 of .* is not an object"),
        ('[{"image": "a.png", "question": "What?", "answer": " "}]', "'answer' must be a text"),
        ('[{"image": "a.png", "question": "<video> What?", "answer": "b"}]', "media marker"),
    ],
)
def test_needles_that_cannot_be_used_are_told(tmp_path, content, message):
    (tmp_path / "needles.json").write_text(content)
    with pytest.raises(HaystackError, match=message):
        read_needles(tmp_path / "needles.json")


def test_a_needle_whose_picture_is_missing_is_told_before_anything_runs(tmp_path):
    (tmp_path / "needles.json").write_text(json.dumps([{"image": "none.png", "question": "What?", "answer": "b"}]))
    with pytest.raises(MediaError, match=r"none\.png"):
        read_needles(tmp_path / "needles.json")


def test_a_needle_is_one_picture_among_the_frames_of_a_video(made):
    frame = needle_frame(read_needles(made[1])[0], UNIT)
    assert frame.is_video and frame.pictures[0].endswith("00000.png") and frame.tokens == 4


def test_other_content_has_another_digest_and_a_copy_the_same(made, tmp_path):
    haystack, needles = (open_haystack(made[0], 1, 4), read_needles(made[1]))
    copy, fewer = write_needle_set(tmp_path / "copy", 12, 9)
    assert digest_of_haystack(open_haystack(copy, 1, 9)) == digest_of_haystack(haystack)
    assert digest_of_needles(read_needles(fewer)) == digest_of_needles(needles)
    assert digest_of_needles(needles[:-1]) != digest_of_needles(needles)
    other = gray_video(tmp_path / "gray.mp4", 12, 1)
    assert digest_of_haystack(open_haystack(other, 1, 4)) != digest_of_haystack(haystack)

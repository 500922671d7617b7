"""Frames of clips and of videos made of pictures: which are taken, and that these are the pictures that are decoded."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.clips import picture_files, take_frames
from megatron_vila.data.fields import Media
from megatron_vila.data.media import MediaError
from megatron_vila.data.video import probe_video
from tests.data.loader_run import Data
from tests.data.material import conversation, read_stamps, stamp, write_video

TALK = {"conversations": conversation()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``a.mp4`` of 32 frames at 8 a second, and ``clip``, a folder of 12 pictures; each carries its number."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "a.mp4", 32)
    (folder / "clip").mkdir()
    for number in range(12):
        Image.fromarray(stamp(number)).save(folder / f"clip/f{number}.png")
    (folder / "clip/notes.txt").write_text("no picture")
    (folder / "clip/.f99.png").touch()
    (folder / "no pictures").mkdir()
    return folder


def taken(folder, num_frames=64, fps=0.0, *, path="a.mp4", **more):
    medium = Media(str(folder / path), True, **more)
    return frames_of(medium, num_frames, fps)


def frames_of(medium, num_frames=64, fps=0.0, probe=probe_video):
    data = DataConfig(num_frames=num_frames, fps=fps)
    return take_frames(medium, data, probe, picture_files)[0].tolist()


def test_only_frames_of_the_clip_are_taken(folder):
    assert taken(folder, start_s=1, end_s=2) == list(range(8, 17)), "both ends included"
    assert taken(folder, start_s=3) == list(range(24, 32))
    assert taken(folder, end_s=0.5) == list(range(5))
    assert taken(folder, 3, start_s=1, end_s=2) == [8, 12, 16]
    at_two = taken(folder, fps=2, start_s=1, end_s=2.9)
    assert 3 <= len(at_two) <= 4 and set(at_two) <= set(range(8, 24))
    assert taken(folder, start_s=0, end_s=99) == taken(folder)


def test_a_clip_between_two_frames_is_the_frame_that_is_shown_then(folder):
    assert taken(folder, start_s=1.01, end_s=1.02) == [8]
    assert taken(folder, start_s=3.9, end_s=9) == [31], "the last frame is shown up to 4 s"


def test_a_clip_behind_the_end_is_an_error_of_its_file(folder):
    with pytest.raises(MediaError, match=r"a.mp4: the clip starts at 4.5 s, the last frame stands at 3.875 s"):
        taken(folder, start_s=4.5, end_s=5)


def test_frames_of_a_variable_rate_are_chosen_by_their_time(folder):
    info = probe_video(folder / "a.mp4")
    # Ten times slower from the 16th frame on.
    pts = info.pts.copy()
    pts[16:] += 9 * (pts[16:] - pts[15])
    slow = dataclasses.replace(info, pts=pts)
    medium = Media(info.source, True, 0, 3)
    assert frames_of(medium, probe=lambda path: slow) == list(range(16))
    assert frames_of(Media(info.source, True, 3, 5.7), probe=lambda path: slow) == [16, 17, 18]


def test_pictures_of_a_folder_are_in_natural_order_and_other_files_are_not_looked_at(folder):
    files = picture_files(str(folder / "clip"))
    assert files == tuple(str(folder / f"clip/f{number}.png") for number in range(12))
    with pytest.raises(MediaError, match="the folder holds no picture that could be a frame"):
        picture_files(str(folder / "no pictures"))


def test_the_rate_of_pictures_serves_clips_and_sampling(folder):
    assert taken(folder, 64, 1, path="clip") == list(range(12)), "no rate is known"
    at_four = Media(str(folder / "clip"), True, fps=4.0)
    assert len(frames_of(at_four, fps=1)) == 3, "12 pictures are 3 seconds"
    clip = Media(str(folder / "clip"), True, 1.0, 2.0, 4.0)
    assert frames_of(clip) == [4, 5, 6, 7, 8]
    with pytest.raises(MediaError, match="a clip of pictures needs their rate: give the record's field 'fps'"):
        taken(folder, path="clip", start_s=1)


@pytest.mark.parametrize("video", ["clip", [f"clip/f{n}.png" for n in range(12)]], ids=["folder", "list"])
def test_the_frames_of_a_video_made_of_pictures_are_decoded(tmp_path, folder, video):
    record = {"id": "pictures", "video": video, "conversations": conversation("<video> What?")}
    data = Data(
        tmp_path, folder, [record, {**record, "id": "clip", "video": "a.mp4", "start": 1, "end": 2}], num_frames=4
    )
    with data.loader(batch=2, shuffle=False) as loader:
        first, second = loader.next_step().rows
    assert read_stamps(first.pixels) == [i for f in first.row.frames for i in f.indices] == [0, 4, 7, 11]
    assert all(frame.is_video for frame in first.row.frames), "separators are those of video frames"
    assert read_stamps(second.pixels) == [8, 11, 13, 16]


def test_a_picture_that_is_missing_makes_its_sample_broken(tmp_path, folder):
    records = [
        {"id": "gap", "video": ["clip/f0.png", "clip/gone.png"], **TALK},
        {"id": "good", "video": "clip", **TALK},
    ]
    with Data(tmp_path, folder, records).loader(batch=1, shuffle=False) as loader:
        (row,) = loader.next_step().rows
    assert row.row.sample_ids == ("good",) and np.isfinite(row.pixels).all()
    assert loader.broken == {0: f"{folder}/clip/gone.png: no such file"}

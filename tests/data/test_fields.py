"""Spellings of media fields, clips, videos made of pictures, and fields that look like media and are not known."""

import pytest

from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.formats.read import parse_record
from megatron_vila.data.placement import Turn
from megatron_vila.data.sources.json_files import JsonFiles
from tests.data.material import conversation, write_jsonl

TALK = {"conversations": conversation()}


def read(**fields):
    return parse_record(fields | TALK, "a.jsonl, line 1", "1", "/m")


def refused(**fields):
    with pytest.raises(RecordError) as error:
        read(**fields)
    assert str(error.value).startswith("a.jsonl, line 1, field '")
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "video",
        "videos",
        "Video",
        "VIDEOS",
        "video_path",
        "video-path",
        "videoPath",
        "video_paths",
        "video_file",
        "videoFiles",
    ],
)
@pytest.mark.parametrize("value", ["a.mp4", ["a.mp4"]])
def test_every_usual_spelling_of_a_video_is_read(name, value):
    assert read(**{name: value}).media == (Media("/m/a.mp4", True),)


@pytest.mark.parametrize("name", ["image", "images", "Image", "image_path", "image_paths", "imageFile", "image_files"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
def test_every_usual_spelling_of_an_image_is_read(name, value):
    assert read(**{name: value}).media == (Media("/m/a.png", False),)


def test_one_thing_said_by_two_fields_is_refused_but_an_empty_one_says_nothing():
    assert "field 'videos': the record has 'video' as well" in refused(video="a.mp4", videos=["a.mp4"])
    assert "field 'Video': the record has 'video' as well" in refused(video="a.mp4", Video="b.mp4")
    assert "the record has a video as well" in refused(video="a.mp4", frames=["0.png"])
    assert read(video="a.mp4", videos=[], image="", images=None, start=None, system="").media == (
        Media("/m/a.mp4", True),
    )


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("start", "end"), ("video_start", "video_end"), ("start_time", "end_time"), ("clip_start", "clip_end"),
        ("start_sec", "end_sec"), ("start_second", "end_second"),
        ("video_start_time", "video_end_time"), ("startSeconds", "endSeconds"),
    ],
)  # fmt: skip
def test_clips_are_read_in_seconds(start, end):
    assert read(video="a.mp4", **{start: 2, end: 7.5}).media == (Media("/m/a.mp4", True, 2.0, 7.5),)
    assert read(video="a.mp4", **{start: 2}).media == (Media("/m/a.mp4", True, 2.0, None),)
    assert read(video="a.mp4", **{end: 2}).media == (Media("/m/a.mp4", True, None, 2.0),)


def test_each_of_several_videos_has_its_own_clip():
    found = read(video=["a.mp4", "b.mp4"], start=[0, None], end=[3, 4]).media
    assert [(m.start_s, m.end_s) for m in found] == [(0, 3), (None, 4)]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"start": 3, "end": 3}, "the clip of '/m/a.mp4' starts at 3 s and ends at 3 s"),
        ({"start": -1}, "field 'start': must be a number of seconds, 0 or more, found -1"),
        ({"end": "0:30"}, "field 'end': must be a number of seconds, 0 or more, found '0:30'"),
        ({"end": True}, "field 'end': must be a number of seconds, 0 or more, found True"),
        ({"end": float("nan")}, "field 'end': must be a number of seconds, 0 or more, found nan"),
        ({"end": float("inf")}, "field 'end': must be a number of seconds, 0 or more, found inf"),
        ({"end": 10**300}, "field 'end': must be a number of seconds, 0 or more"),
        ({"start": [1, 2]}, "field 'start': 2 values for 1 videos"),
        ({"video": ["a.mp4", "b.mp4"], "start": 3}, "field 'start': 1 values for 2 videos"),
        ({"video": None, "start": 3}, "field 'start': the record has no video to take a clip of"),
        ({"fps": -1}, "field 'fps': must be a rate as 30, 29.97 or \"30000/1001\", or 0 where it is not known, found -1"),
        ({"fps": "fast"}, "field 'fps': must be a rate"),
        ({"fps": "1/2/3"}, "field 'fps': must be a rate"),
        ({"fps": [25, 30]}, "field 'fps': 2 values for 1 videos"),
    ],
)  # fmt: skip
def test_a_clip_that_cannot_be_meant_is_refused(fields, complaint):
    fields = {"video": "a.mp4"} | fields
    with pytest.raises(RecordError) as error:
        read(**fields)
    assert complaint in str(error.value)


def test_pictures_in_a_list_are_the_frames_of_one_video_in_their_order():
    one = Media("/m/f", True, fps=2.0, pictures=("/m/f/10.jpg", "/m/f/9.PNG"))
    assert read(video=["f/10.jpg", "f/9.PNG"], fps=2).media == (one,)
    assert read(frames=["f/10.jpg", "f/9.PNG"], fps=2).media == (one,)
    assert read(video=[["f/10.jpg", "f/9.PNG"]], fps=[2]).media == (one,)
    assert read(video="f/10.jpg").media == (Media("/m/f", True, pictures=("/m/f/10.jpg",)),)
    assert read(video="f", frames=32).media == read(frames="f").media == (Media("/m/f", True),), (
        "a folder; 32 is a note"
    )
    both = read(video=[["f/1.jpg"], "b.mp4"]).media
    assert both == (Media("/m/f", True, pictures=("/m/f/1.jpg",)), Media("/m/b.mp4", True))
    assert "pictures and videos in one list" in refused(video=["f/1.jpg", "b.mp4"])
    assert "'/m/b.mp4' is not a picture by its name" in refused(frames=["f/1.jpg", "b.mp4"])
    assert "must be a path or a list of paths, found 0" in refused(frames=[0, 8, 16])
    assert "a video of pictures needs at least one" in refused(video=[[]])


@pytest.mark.parametrize(
    ("written", "fps"),
    [
        (25, 25.0), ("25", 25.0), ("29.97", 29.97), ("30/1", 30.0), ("30000/1001", 30000 / 1001), ([" 30/1"], 30.0),
        (0, None), (0.0, None), ("0/0", None), ("0", None), (None, None), ("", None), ([""], None), ([None], None),
    ],
)  # fmt: skip
def test_a_rate_is_a_number_or_a_fraction_and_none_where_it_is_not_known(written, fps):
    assert [medium.fps for medium in read(video="a.mp4", fps=written).media] == [fps]
    assert [medium.fps for medium in read(frames="f", video_fps=written).media] == [fps]


def test_an_image_that_is_a_video_by_its_name_is_refused_and_a_gif_is_a_picture():
    assert "'/m/a.mp4' is a video by its name; give it in the field 'video'" in refused(image="a.mp4")
    assert read(image="a.gif").media == (Media("/m/a.gif", False),)
    assert read(video="a.gif").media == (Media("/m/a.gif", True),)


def test_a_system_text_beside_the_conversation_is_its_first_turn():
    for name in ("system", "System", "system_prompt"):
        assert read(**{name: "Be brief."}).turns[0] == Turn("system", "Be brief.")
    assert "field 'system': must be text, found 3" in refused(system=3)
    with pytest.raises(RecordError, match="field 'system': the conversation begins with a system turn"):
        parse_record(
            {"system": "a", "conversations": [{"from": "system", "value": "b"}, *conversation()]}, "x", "1", ""
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"video_url": "https://host/a"},
        {"clip": [0, 10]},
        {"clip": "a"},
        {"start_frame": 10},
        {"video_range": [3, 5]},
        {"audio": "speech"},
        {"key_frames": ["a", "b"]},
        {"file": "a.mp4"},
        {"metadata": {"source": ["x", "b.webm"]}},
        {"sound": "s.wav"},
        {"imgs": ["a.jpg"]},
        {"img": "abc"},
        {"media": ["abc"]},
        {"source": "a.heic"},
    ],
    ids=str,
)
def test_a_field_that_looks_like_media_and_is_not_known_is_refused(tmp_path, fields):
    (name,) = fields
    message = refused(**fields)
    assert f"field '{name}'" in message and "data.ignore_fields" in message
    path = write_jsonl(tmp_path / "a.jsonl", [fields | TALK])
    assert JsonFiles([path], ignore_fields=[name]).record(0).media == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("begin", 3), ("finish", 5.5), ("start_ms", 1000), ("end_timestamp", "00:01:02"), ("t_start", "3.5"),
        ("segment", [3, 5]), ("time_range", ["0:03", "0:05"]), ("timestamp", [1.5, 4]), ("Moment", [1, 2]),
    ],
)  # fmt: skip
def test_what_seems_to_cut_a_clip_under_another_name_is_refused_where_there_is_a_video(tmp_path, name, value):
    message = refused(video="a.mp4", **{name: value})
    assert f"field '{name}': seems to cut a clip" in message and "data.ignore_fields" in message
    assert read(image="a.png", **{name: value}).media == (Media("/m/a.png", False),)
    path = write_jsonl(tmp_path / "a.jsonl", [{"video": "a.mp4", name: value} | TALK])
    assert JsonFiles([path], "/m", ignore_fields=[name]).record(0).media == (Media("/m/a.mp4", True),)


def test_times_of_events_in_a_video_are_no_clip():
    notes = {"timestamps": [[0, 3.5], [4, 8]], "end_reason": "cut", "segments": [[1, 2]], "start_idx": 4, "duration": 8}
    assert read(video="a.mp4", **notes).media == (Media("/m/a.mp4", True),)


def test_media_in_a_turn_are_refused():
    turns = [{"from": "human", "value": "What?", "image": "a.png"}, {"from": "gpt", "value": "A cat."}]
    with pytest.raises(RecordError, match="field 'conversations', turn 1, field 'image': holds the media file 'a.png'"):
        parse_record({"conversations": turns}, "x", "1", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"needle_frame": 3},
        {"num_frames": 8, "frame_count": 240, "video_duration": 12.5, "image_size": [640, 480]},
        {"video_id": "dQw4w9WgXcQ", "image_id": "COCO_42", "clip_idx": 3},
        {"has_video": True, "audio": None, "frame_times": []},
        {"source": "youtube", "model": "gpt-4", "height_list": [3, 4], "category": "a.b"},
    ],
    ids=str,
)
def test_notes_about_media_are_no_media(fields):
    assert read(**fields).media == ()

"""LLaVA-format files: what is read, and what a mistake in them says."""

import json
import os

import pytest

from megatron_vila.data.fields import Media, RecordError
from megatron_vila.data.placement import Turn
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.source import BadRecordsError
from tests.data.material import conversation, write_jsonl


def read_one(tmp_path, record, **options):
    return JsonFiles([write_jsonl(tmp_path / "train.jsonl", [record])], **options).record(0)


def all_of(files):
    return [files.record(index) for index in range(len(files))]


def test_a_json_list_and_json_lines_give_the_same_records(tmp_path):
    records = [
        {"id": 7, "image": "a.png", "conversations": conversation("<image>\nOù est le chat ? 猫", "Ici.")},
        {"video": "b.mp4", "conversations": conversation("What?\n<video>")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *conversation()]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=r is records[1]) for r in records), encoding="utf-8"
    )
    listed = JsonFiles([str(tmp_path / "train.json")])
    lined = JsonFiles([str(tmp_path / "lines.jsonl")])
    assert len(listed) == len(lined) == 3
    assert [r[1:] for r in all_of(listed)] == [r[1:] for r in all_of(lined)]
    assert listed.record(0).sample_id == "7"
    assert listed.record(0).turns == (Turn("user", "<image>Où est le chat ? 猫"), Turn("assistant", "Ici."))
    assert listed.record(1).media == (Media(str(tmp_path / "b.mp4"), True),)
    assert listed.record(1).sample_id == "train.json#2"
    assert lined.record(1).sample_id == "lines.jsonl#3", "the line in the file, blank lines counted"
    assert listed.record(2).turns[0] == Turn("system", "Be brief.")


def test_files_are_read_one_after_the_other_with_paths_relative_to_each(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = write_jsonl(tmp_path / "one" / "a.jsonl", [{"image": "x.png", "conversations": conversation()}] * 2)
    second = write_jsonl(tmp_path / "two" / "b.jsonl", [{"image": "/abs/y.png", "conversations": conversation()}])
    records = JsonFiles([first, second])
    assert [r.media[0].path for r in all_of(records)] == [str(tmp_path / "one" / "x.png")] * 2 + ["/abs/y.png"]
    assert JsonFiles([first], media_dir="/media").record(0).media[0].path == "/media/x.png"
    with pytest.raises(IndexError):
        records.record(3)


def test_media_without_a_marker_stand_before_the_first_human_turn(tmp_path):
    record = {
        "images": ["a.png", "b.png"],
        "conversations": [{"from": "system", "value": "S"}, *conversation("Q", "A")],
    }
    assert [t.text for t in read_one(tmp_path, record).turns] == ["S", "<image><image>Q", "A"]
    record = {"video": "a.mp4", "conversations": conversation("Q", "A")}
    assert read_one(tmp_path, record).turns[0].text == "<video>Q"


def test_media_are_sorted_to_their_markers(tmp_path):
    record = {
        "images": ["a.png", "b.png"],
        "video": "c.mp4",
        "conversations": [*conversation("<image> then <video>"), *conversation("Like this: <image>")],
    }
    in_place = read_one(tmp_path, record, media_format="verbatim")
    assert [os.path.basename(m.path) for m in in_place.media] == ["a.png", "c.mp4", "b.png"]
    assert [os.path.basename(m.path) for m in read_one(tmp_path, record).media] == ["a.png", "b.png", "c.mp4"]


def test_an_image_marker_stands_for_a_video_where_there_are_only_videos(tmp_path):
    record = {"video": "c.mp4", "conversations": conversation("<image>\nWhat?")}
    assert read_one(tmp_path, record).media[0].is_video


GOOD = {"conversations": conversation()}


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({}, "line 2: nothing to train; one of the fields 'conversations'"),
        ({"conversations": []}, "line 2, field 'conversations': must be a list of turns"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "turn 1: 'from' must be one of system, developer, human, user, gpt, assistant, model, chatgpt, bing, bard, "
            "found 'bot'",
        ),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1: 'value' must be text, found None"),
        (
            {"conversations": [*conversation(), {"from": "system", "value": "x"}]},
            "turn 3: a system turn must be the first",
        ),
        ({"video": 3, **GOOD}, "field 'video': must be a path or a list of paths, found 3"),
        ({"images": ["a.png", ""], **GOOD}, "field 'images': must be a path"),
        ({"image": "a.png", "images": ["b.png"], **GOOD}, "field 'images': the record has 'image' as well"),
        ({"id": ["x"], **GOOD}, "field 'id': must be text or a whole number, found ['x']"),
        ({"id": 1.5, **GOOD}, "field 'id': must be text or a whole number, found 1.5"),
        ({"id": float("nan"), **GOOD}, "field 'id': must be text or a whole number, found nan"),
        ({"id": True, **GOOD}, "field 'id': must be text or a whole number, found True"),
        ({"id": "\ud83d", **GOOD}, r"field 'id': \ud83d is half of a character"),
        ({"conversations": [{"from": [], "value": "x"}]}, "turn 1: 'from' must be one of system, developer, human"),
        (
            {"conversations": ["x"]},
            "turn 1: must be an object with 'from' and 'value', or with 'role' and 'content', found 'x'",
        ),
        ({"conversations": {"from": "human"}}, "line 2, field 'conversations': must be a list of turns"),
        ({"conversations": conversation("What? \ud83d")}, r"turn 1: \ud83d is half of a character"),
        ({"conversations": conversation("zero \0")}, "field 'conversations': the text holds U+0000, which is not a character"),
        ({"text": "zero \0"}, "field 'text': the text holds U+0000, which is not a character; remove it"),
        ({"system": "\0", **GOOD}, "field 'conversations': the text holds U+0000"),
        ({"video": "a\0.mp4", **GOOD}, "field 'video': 'a\\x00.mp4' holds a zero byte"),
        ({"video": "\udc00.mp4", **GOOD}, r"field 'video': \udc00 is half of a character"),
        (
            {"video": {"path": "a.mp4"}, **GOOD},
            "field 'video': must be a path or a list of paths, found {'path': 'a.mp4'}",
        ),
        ({"image": "a.png", "conversations": conversation("Is <image> <image>?")}, "2 markers for 1 files"),
        ({"conversations": conversation("<video>")}, "a marker stands for a file, and none is given"),
        ({"video": "a.mp4", "conversations": [{"from": "gpt", "value": "x"}]}, "no human turn to put them before"),
        ([1], "a record must be a JSON object, found list"),
    ],
)
def test_a_bad_record_is_named_by_file_record_and_field(tmp_path, record, complaint):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, record])
    with pytest.raises(RecordError) as error:
        JsonFiles([path])
    assert f"{path}, line 2" in str(error.value)
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"conversations": [', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"\xff\xfe{}", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"\n \n", "the file holds no record"),
        ("a.json", b"[]", "the file holds no record"),
        ("a.json", b"", "must hold one list of records"),
        ("a.json", b'{"a": 1}', "must hold one list of records"),
        ("a.json", b'[{"a": 1}, {"a" 2}]', "a.json, record 2: not JSON"),
        ("a.json", b'[{"a": 1}, {"a": 2}', "a.json, record 2: the list breaks off"),
        ("a.json", b'[{"a": 1}]}, {"a": 2}]', "a.json, record 2: text follows the end of the list"),
        ("a.json", b"[\xff]", "not UTF-8"),
        ("a.txt", b"[]", "must end in .json"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match="a.") as error:
        JsonFiles([str(tmp_path / name)])
    assert complaint in str(error.value)


HOSTILE = [
    ("half of an emoji", '{"conversations": [{"from": "human", "value": "\\ud83d"}]}', "half of a character"),
    ("too deep", '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ("too many digits", '{"id": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ("beyond all numbers", '{"id": 1e999, "conversations": []}', "field 'conversations'"),
    ("a field twice", '{"id": 1, "id": 2}', "the field 'id' stands twice"),
    ("a field twice in a turn", '{"conversations": [{"from": "human", "value": "a", "value": "b"}]}', "stands twice"),
    ("no JSON", '{"id" 1}', "not JSON"),
    ("control character", '{"id": "\t"}', "not JSON"),
    ("nothing", "null", "must be a JSON object, found NoneType"),
]


@pytest.mark.parametrize("indent", [None, 1])
def test_every_bad_record_is_told_at_once_and_the_others_are_read(tmp_path, indent):
    good = json.dumps({"id": "good", "conversations": conversation('Is "[" or }] in it?', "\\")}, indent=indent)
    texts = [good, *(text for _, text, _ in HOSTILE), good]
    (tmp_path / "a.json").write_text("[" + ",\n".join(texts) + "]")
    files = JsonFiles([str(tmp_path / "a.json")], skip_bad=True)
    assert len(files) == len(texts) and sorted(files.bad) == list(range(1, len(texts) - 1))
    for number, (what, _, reason) in enumerate(HOSTILE, start=2):
        assert f"a.json, record {number}" in files.bad[number - 1] and reason in files.bad[number - 1], what
        assert files.name(number - 1) in files.bad[number - 1]
    assert files.record(0) == files.record(len(texts) - 1)
    with pytest.raises(RecordError, match="record 2"):
        files.record(1)
    with pytest.raises(BadRecordsError, match=f"{len(HOSTILE)} of {len(texts)} records cannot be used") as error:
        JsonFiles([str(tmp_path / "a.json")])
    assert error.value.bad == files.bad


def test_a_lost_quotation_mark_spoils_no_record_on_another_line(tmp_path):
    lines = ['{"id": 1, "conversations": []}', '{"id": 2", "conversations": []}', json.dumps({"id": 3, **GOOD})]
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(lines) + "\n]")
    files = JsonFiles([str(tmp_path / "a.json")], skip_bad=True)
    assert (len(files), sorted(files.bad), files.record(2).sample_id) == (3, [0, 1], "3")


def test_the_report_shows_the_first_bad_records_and_the_number_of_the_others(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [GOOD, *[{"id": n} for n in range(12)]])
    with pytest.raises(BadRecordsError, match=r"(?s)12 of 13 records.*line 11: nothing to train.*\n  ... and 2 more") as error:
        JsonFiles([path])
    assert "line 12" not in str(error.value)


def test_a_set_without_a_good_record_is_refused_though_bad_ones_are_skipped(tmp_path):
    with pytest.raises(BadRecordsError, match="1 of 1 records cannot be used"):
        JsonFiles([write_jsonl(tmp_path / "a.jsonl", [{}])], skip_bad=True)


def test_ids_may_be_whole_numbers_written_as_floats_and_empty_media_are_none(tmp_path):
    record = {"id": 7.0, "image": "", "video": None, "images": [], **GOOD}
    found = read_one(tmp_path, record)
    assert (found.sample_id, found.media) == ("7", ())


def test_an_id_is_one_line_of_a_log(tmp_path):
    assert read_one(tmp_path, {"id": "a\nb\x1b[2J\u2028c", **GOOD}).sample_id == "a b [2J c"


def test_a_missing_file_and_an_empty_list_of_files_are_refused(tmp_path):
    with pytest.raises(RecordError, match=r"none.jsonl: the file with samples cannot be read: No such file"):
        JsonFiles([str(tmp_path / "none.jsonl")])
    with pytest.raises(RecordError, match="set data.train"):
        JsonFiles([])

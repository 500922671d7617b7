"""``python -m megatron_vila.data check``: what it reads, what it says, and its exit status."""

import json
import logging
import os

import pytest

from megatron_vila.data.__main__ import main
from tests.data.material import byte_level_tokenizer, conversation, destroy_frames, write_jsonl, write_video
from tests.data.shard_files import write_shards

SMALL = ["--config", "tiny", "--set", "data.num_frames=4", "model.llm.vocab_size=1000"]


@pytest.fixture(autouse=True)
def log_level():
    """The command quiets a logger of the process, which later tests listen to."""
    logger = logging.getLogger("megatron_vila.data")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "good.mp4", 32)
    destroy_frames(write_video(folder / "bad.mp4", 32), 14, 18)
    (folder / "empty.mp4").touch()
    byte_level_tokenizer("qwen2").save_pretrained(folder / "tokenizer")
    return folder


def video(name, **more):
    return {"id": name, "video": name, "conversations": conversation("What?", "A cat."), **more}


def report(folder, records, capsys, *arguments):
    path = write_jsonl(folder / "samples.jsonl", records)
    status = main(["check", path, "--json", str(folder / "report.json"), *arguments])
    said = capsys.readouterr()
    assert status != 2, said.err
    return status, json.loads((folder / "report.json").read_text()), said.out, said.err


def test_a_set_without_a_fault_is_counted_and_ends_with_status_0(folder, capsys):
    records = [video("good.mp4"), video("good.mp4", start=1, end=1), {"conversations": conversation()[:1]}]
    records[1]["end"] = 1.2
    status, found, out, err = report(folder, records, capsys, *SMALL, "--tokenizer", str(folder / "tokenizer"))
    assert status == 0
    assert (found["samples"], found["usable"], found["frames"], found["unanswered"]) == (3, 3, 4 + 2, 1)
    assert found["tokens"] > found["longest"] > 4 * 4 and found["truncated"] == 0 and found["problems"] == []
    assert "3 of 3 samples can be used, with 6 frames" in out and "1 have no answer to learn" in out
    assert "checked 3 of 3, 0 bad" in err


def test_everything_that_cannot_be_used_is_found_named_and_counted_by_its_kind(folder, capsys):
    records = [
        video("good.mp4"),
        video("gone.mp4"),
        video("bad.mp4"),
        video("empty.mp4"),
        {"id": "no conversation"},
        {"id": "long", "conversations": conversation("word " * 400)},
        video("good.mp4", id="cut", conversations=conversation("word " * 30)),
    ]
    more = ("--tokenizer", str(folder / "tokenizer"), *SMALL, "train.seq_length=180", "data.num_frames=32")
    status, found, out, _ = report(folder, records, capsys, *more)
    assert status == 1
    assert found["counts"] == {"bad_record": 1, "missing": 1, "broken": 2, "too_long": 1}
    assert (found["usable"], found["truncated"], found["truncated_share"]) == (2, 1, 0.5)
    kinds = {problem["sample_id"]: (problem["kind"], problem["place"]) for problem in found["problems"]}
    path = str(folder / "samples.jsonl")
    assert kinds["gone.mp4"] == ("missing", f"{path}, line 2") and kinds["bad.mp4"] == ("broken", f"{path}, line 3")
    assert "5 cannot be used: 1 bad record, 1 missing, 2 broken, 1 too long" in out
    assert f"broken: {path}, line 4, sample empty.mp4: {folder}/empty.mp4: the file is empty" in out
    assert f"bad record: {path}, line 5: nothing to train" in out
    assert "1 (50.0%) lose frames to fit train.seq_length" in out


def test_without_a_tokenizer_media_are_read_and_nothing_is_said_of_tokens(folder, capsys):
    status, found, out, _ = report(folder, [video("good.mp4"), video("gone.mp4")], capsys, "--threads", "1")
    assert (status, found["frames"], found["tokens"]) == (1, 8, None)
    assert "tokens" not in out


def test_the_files_and_settings_of_a_run_are_those_of_its_configuration(folder, capsys):
    path = write_jsonl(folder / "run.jsonl", [video("good.mp4"), {}])
    config = folder / "run.yaml"
    config.write_text(f"include: [tiny]\ndata: {{train: ['{path}'], num_frames: 3, bad_records: stop}}\n")
    assert main(["check", "--config", str(config)]) == 1
    assert "1 of 2 samples can be used, with 3 frames" in capsys.readouterr().out


def test_of_a_folder_with_a_split_the_part_is_checked_that_a_run_would_read(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = [[("a", {"json": video("0.mp4")})], [(f"held-{n}", {"json": b"{}"}) for n in range(2)]]
    write_shards(tmp_path / "set", shards, {"train": ["000000.tar"], "val": ["000001.tar"], "test": []})
    sets = [f"data.train=[{tmp_path / 'set'}]", f"data.eval=[{tmp_path / 'set'}]"]
    assert main(["check", *SMALL, *sets]) == 1
    said = capsys.readouterr().out
    assert "0 of 3 samples can be used" in said and "000001.tar, sample held-1" in said


def test_a_set_without_a_good_record_does_not_keep_the_others_from_being_checked(folder, capsys):
    good = write_jsonl(folder / "good.jsonl", [video("good.mp4")])
    none = write_jsonl(folder / "none.jsonl", [{}] * 3)
    assert main(["check", *SMALL, f"data.train=[{good}]", f"data.eval=[{none}]"]) == 1
    assert "1 of 4 samples can be used, with 4 frames" in capsys.readouterr().out


def test_a_named_prompt_serves_a_tokenizer_without_a_template(folder, capsys):
    tokenizer = byte_level_tokenizer("llama3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    _, found, _, _ = report(
        folder, [video("good.mp4")], capsys, "--tokenizer", str(folder / "plain"), *SMALL, "data.template=llama_3"
    )
    assert found["usable"] == 1 and found["tokens"] > 100


def test_where_nothing_is_good_all_records_are_listed_as_json(folder, capsys):
    path = write_jsonl(folder / "none.jsonl", [{}] * 30)
    assert main(["check", path, "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["counts"]["bad_record"] == 30
    assert main(["check", path]) == 1
    assert "... and 10 more" in capsys.readouterr().out


def test_what_cannot_be_checked_ends_with_status_2(folder, capsys):
    assert main(["check", str(folder / "nowhere.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["check", str(folder / "run.jsonl"), "--config", "nowhere"]) == 2
    assert main(["check", str(folder / "run.jsonl"), "--json", "/nowhere/report.json"]) == 2
    said = capsys.readouterr()
    assert "1 of 2 samples can be used" in said.out and "--json /nowhere/report.json cannot be written" in said.err
    assert main(["check", str(folder / "run.jsonl"), "--tokenizer", str(folder)]) == 2


def test_settings_that_a_run_would_refuse_are_refused_all_at_once(folder, capsys):
    path = str(folder / "run.jsonl")
    wrong = ["data.num_frames=0", "data.media_format=other", "data.template_clock=now", "model.vision.patch_size=0"]
    assert main(["check", path, "--media-dir", "/nowhere", "--tokenizer", "nowhere", *SMALL, *wrong]) == 2
    said = capsys.readouterr().err
    assert "6 problems in the configuration" in said
    for words in (*wrong, "data.media_dir='/nowhere' is not a folder", "data.tokenizer='nowhere' is not a folder"):
        assert words in said
    assert main(["check", path, *SMALL, "data.frame_separator_ids=[1000]"]) == 2
    assert "data.frame_separator_ids has the ids [1000] outside the embedding table" in capsys.readouterr().err
    assert main(["check", "--config", "tiny", "--set", "data.eval=[nowhere.json]"]) == 2
    assert "data.eval names 'nowhere.json', which does not exist" in capsys.readouterr().err
    twice = ["--set", f"data.train=[{path},{path}]", "--set", "data.weights=[1]"]
    assert main(["check", "--config", "tiny", *twice]) == 2
    assert "data.weights=[1] has 1 numbers and data.train 2 entries" in capsys.readouterr().err


def test_settings_that_have_nothing_to_do_with_samples_do_not_matter(folder, capsys):
    other = ["optim.lr=-1", "parallel.tp=7", "train.output=", "checkpoint.load=/nowhere"]
    report(folder, [video("good.mp4")], capsys, *SMALL, *other)


def test_the_tokenizer_of_another_model_is_refused_where_a_model_is_named(folder, capsys):
    path, own = write_jsonl(folder / "one.jsonl", [video("good.mp4")]), ["--tokenizer", str(folder / "tokenizer")]
    assert main(["check", path, *own, "--config", "longvila-7b-stage5"]) == 2
    assert "it is that of another model" in capsys.readouterr().err
    assert main(["check", path, *own]) == 0


def test_samples_of_shards_are_checked_one_by_one_and_told_by_shard_and_key(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good = (folder / "good.mp4").read_bytes()
    samples = {
        "good": {"json": video("0.mp4"), "0.mp4": good},
        "damaged": {"json": video("0.mp4"), "0.mp4": destroy_frames(write_video(tmp_path / "a.mp4", 8), 0, 7).read_bytes()},
        "empty": {"json": video("0.mp4"), "0.mp4": b""},
        "missing": {"json": video("0.mp4")},
        "none": {"0.mp4": good},
        "latin": {"json": b'{"id": "\xe9"}'},
        "cut": {"json": video("0.mp4"), "0.mp4": good},
    }
    write_shards(tmp_path / "set", [list(samples.items())])
    tar = tmp_path / "set/000000.tar"
    os.truncate(tar, tar.read_bytes().index(b"cut.0.mp4") + 700)
    status = main(["check", str(tmp_path / "set"), *SMALL, "--threads", "1", "--json", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())
    assert (status, found["samples"], found["usable"]) == (1, 7, 1)
    assert found["counts"] == {"bad_record": 4, "missing": 0, "broken": 2, "too_long": 0}
    reasons = [f"{problem['place']} {problem['reason']}" for problem in found["problems"]]
    for key, words in (
        ("damaged", "frame 0 of 8"),
        ("empty", "the file is empty"),
        ("missing", "no part of the sample is called"),
        ("none", "has no part json"),
        ("latin", "not UTF-8"),
        ("cut", "cut off"),
    ):
        assert any(f"{tar}, sample {key}" in reason and words in reason for reason in reasons), (key, reasons)
    capsys.readouterr()

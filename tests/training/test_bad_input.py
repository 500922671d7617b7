"""What a user gets for bad files of samples: one message with a cure, and all ranks end, or go on without what is bad."""

import json
import re
import shutil

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.training.run_data import open_dataset
from megatron_vila.training.summary import read_metrics
from tests.data.material import conversation, cut_off, destroy_frames, write_jsonl
from tests.ranks import pool
from tests.training.command_run import command_on_rank, dry_run, refused, run_command
from tests.training.real_run import REPOSITORY, Layout, launch, numbers, overrides


@pytest.fixture(scope="module")
def broken(videos, tmp_path_factory):
    """A copy of the data in which three videos are empty, cut off and destroyed from the fourth of six frames on."""
    folder = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(videos, folder)
    (folder / "videos/train_6_00000.mp4").write_bytes(b"")
    cut_off(folder / "videos/train_6_00002.mp4")
    destroy_frames(folder / "videos/train_6_00004.mp4", 3, 5)
    return folder


def test_a_dry_run_shows_several_samples_and_says_of_broken_ones_what_is_wrong_with_them(broken, tmp_path):
    data = [f"data.{name}=[{broken / 'train_6.json'}]" for name in ("train", "eval")]
    status, out, err = dry_run(overrides(broken, tmp_path / "run"), "--show", "0", "4", "eval:2", "5", *data)
    assert (status, err) == (0, "")
    assert re.search(r"number 0 cannot be used \(broken\): .*00000.mp4: the file is empty", out)
    assert re.search(r"number 4 cannot be used \(broken\): .*00004.mp4: decoding frame ", out), "its pixels are read"
    assert re.search(r"number 2 cannot be used \(broken\): .*00002.mp4: ", out)
    assert out.count("(a run leaves it out)") == 2
    assert out.count("(an evaluation leaves it out)") == 1
    assert "number 1, the next that can be used:\n" in out and out.count("number 5") == 2 and "number 5:\n" in out
    assert "is broken and left out" not in out, "once is enough"
    status, out, _ = dry_run([*overrides(broken, tmp_path / "run"), data[0]])
    assert status == 0 and "number 0 cannot be used" in out and "number 1, the next that can be used:\n" in out


@pytest.fixture(scope="module")
def broken_alone(broken, tmp_path_factory):
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("broken_alone")
    status, said, err = run_command(Layout(), _broken_arguments(broken, output))
    assert (status, err) == (0, "")
    return numbers(output), json.loads((output / "summary.json").read_text())


def _broken_arguments(broken, output):
    return overrides(broken, output, "data.shuffle=false", "train.steps=2", "data.max_broken=1", train=["6"])


@pytest.mark.parametrize("layout", [Layout(2, ulysses=2), Layout(2), Layout(4, tp=2, pp=2)], ids=str)
def test_a_broken_video_is_left_out_on_every_rank_counted_and_named_once(
    broken, broken_alone, tmp_path, layout
):
    """Under ulysses=2 only the second rank decodes the destroyed half of a video; two replicas each meet other videos."""
    status, said, err = run_command(layout, _broken_arguments(broken, tmp_path))
    assert (status, err) == (0, "")
    for name in ("train_6_00000", "train_6_00002", "train_6_00004"):
        assert said.count(f"sample {name} is broken and left out") == 1, said
    wanted, summary = broken_alone
    assert (summary["left_out_broken"], summary["drawn"]) == (6, 14), "each of the three once an epoch"
    assert json.loads((tmp_path / "summary.json").read_text())["left_out_broken"] == 6
    for step, single in zip(numbers(tmp_path), wanted, strict=True):
        assert step == pytest.approx(single, rel=1e-9)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_nothing_but_broken_videos_ends_all_ranks_with_one_message(videos, tmp_path, packing):
    records = json.loads((videos / "train_3.json").read_text())[:2]
    for number, record in enumerate(records):
        record["video"] = str(tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.mp4").write_bytes(b"not a video")
    path = write_jsonl(tmp_path / "broken.jsonl", records)
    arguments = overrides(videos, tmp_path / "run", f"data.train=[{path}]", f"data.packing={packing}")
    refused(Layout(2, ulysses=2), arguments, "none of the 2 samples can be used", str(tmp_path / "0.mp4"))


def test_bad_records_are_told_in_one_report_and_left_out_or_end_the_run_as_the_setting_says(videos, tmp_path):
    good = json.loads((videos / "train_3.json").read_text())
    for record in good:
        record["video"] = str(videos / record["video"])
    bad = [{"id": "emoji", "conversations": conversation("\ud83d")}, *[{"id": n} for n in range(12)]]
    path = write_jsonl(tmp_path / "mixed.jsonl", [*good[:4], *bad])
    arguments = overrides(videos, tmp_path / "run", f"data.train=[{path}]", "train.steps=2", "data.max_broken=1")
    status, said, err = run_command(Layout(2), [*arguments, "data.shuffle=false"])
    assert (status, err) == (0, "")
    assert said.count("13 of 17 records cannot be used:") == 1
    assert f"{path}, line 5, field 'conversations', turn 1:" in said and "... and 3 more" in said
    report = (tmp_path / "run/bad_records.txt").read_text().splitlines()
    assert len(report) == 13 and all(f"{path}, line {n}" in line for n, line in enumerate(report, start=5))
    assert json.loads((tmp_path / "run/summary.json").read_text())["left_out_broken"] == 13
    assert read_metrics(tmp_path / "run")[0][-1]["left_out_broken"] == 13
    status, said, err = pool.run(1, command_on_rank, 1, ["tiny", *arguments, "--dry-run"])[0]
    assert (status, err) == (0, "") and "13 of 17 records cannot be used:" in said
    arguments = overrides(videos, tmp_path / "stop", f"data.train=[{path}]", "data.bad_records=stop")
    refused(Layout(2), arguments, "13 of 17 records cannot be used:", "... and 3 more", "data.bad_records=skip")
    assert len((tmp_path / "stop/bad_records.txt").read_text().splitlines()) == 13


def test_too_many_broken_samples_end_the_run_when_all_is_saved(videos, tmp_path):
    records = [{"id": f"talk {i}", "conversations": conversation()} for i in range(3)]
    missing = [{"id": f"gone {i}", "video": "gone.mp4", "conversations": conversation()} for i in range(3)]
    path = write_jsonl(tmp_path / "mixed.jsonl", [*records, *missing])
    run = tmp_path / "run"
    arguments = overrides(
        videos, run, f"data.train=[{path}]", f"data.eval=[{path}]", "data.shuffle=false", "train.global_batch_size=6",
        "optim.schedule=constant",
    )  # fmt: skip
    # At the end: 9 of 21, counted over both replicas and over a resume.
    assert run_command(Layout(2), [*arguments, "train.steps=1", "data.max_broken=0.5"])[0] == 0
    words = ("9 of the 21 samples drawn in 2 steps were broken (42.9 %)", "data.max_broken=0.4", "check")
    refused(Layout(2), [*arguments, "train.steps=2", "data.max_broken=0.4"], *words)
    assert latest_checkpoint(run).name == "step-00000002" and (run / "summary.json").exists()
    # On the way: from the 500th sample on, which the first packed step draws into its window.
    packed = [*arguments, f"train.output={tmp_path / 'packed'}", "data.packing=true", "train.seq_length=512", "train.steps=20"]
    refused(Layout(2), [*packed, "data.max_broken=0.4"], "samples drawn in 1 steps were broken (49.9 %)")
    assert latest_checkpoint(tmp_path / "packed").name == "step-00000001"
    assert run_command(Layout(2), [*packed, "data.max_broken=1", "train.steps=2"])[0] == 0
    # At the start: what is bad by its form is known before the first step.
    path = write_jsonl(tmp_path / "bad.jsonl", [*[records[0]] * 470, *[{"id": n} for n in range(30)]])
    words = ("30 of 500 records cannot be used", "more than data.max_broken=0.05 allows")
    refused(Layout(2), overrides(videos, tmp_path / "none", f"data.train=[{path}]"), *words)


def _lengths(settings):
    dataset = open_dataset(load_config("tiny", settings), "train")
    return [len(dataset.build(index).document) for index in range(len(dataset))]


def test_samples_longer_than_the_context_lose_frames_evenly_or_are_dropped_and_are_counted(videos, tmp_path):
    settings = overrides(videos, tmp_path / "x", train=["3", "6"])
    limit = max(_lengths(settings)) - 1
    over_long = sum(length > limit for length in _lengths(settings))
    # An epoch of 16 samples.
    more = (f"train.seq_length={limit}", "train.steps=4")
    layout = Layout(2, ulysses=2)
    assert run_command(layout, overrides(videos, tmp_path / "cut", *more, train=["3", "6"]))[0] == 0
    summary = json.loads((tmp_path / "cut/summary.json").read_text())
    assert (summary["truncated"], summary["left_out_too_long"]) == (over_long, 0)
    assert summary["frames"] == 8 * 3 + 8 * 6 - over_long
    more += ("data.over_long=drop",)
    assert run_command(layout, overrides(videos, tmp_path / "drop", *more, train=["3", "6"]))[0] == 0
    summary = json.loads((tmp_path / "drop/summary.json").read_text())
    assert summary["truncated"] == 0 and summary["left_out_too_long"] >= over_long
    assert summary["drawn"] == 16 + summary["left_out_too_long"], "others come in their place"
    refused(layout, overrides(videos, tmp_path / "none", "train.seq_length=4"), "do not fit train.seq_length=4")


def test_an_epoch_without_a_supervised_token_ends_the_run(videos, tmp_path):
    records = [{"id": f"talk {i}", "conversations": conversation()[:1]} for i in range(4)]
    path = write_jsonl(tmp_path / "questions.jsonl", records)
    arguments = overrides(videos, tmp_path / "run", f"data.train=[{path}]", "train.global_batch_size=2")
    for layout in (Layout(2), Layout(2, pp=2)):
        refused(layout, arguments, "a whole epoch of data.train", "questions.jsonl", "no supervised token")
    assert latest_checkpoint(tmp_path / "run") is None


# ---------------------------------------------------------------------------------------------------------------------
# one rank alone


def test_what_only_one_replica_meets_is_told_once_and_ends_all_processes(videos, tmp_path):
    """The second replica reads another file than the first one, without a good record."""
    write_jsonl(tmp_path / "samples_0.jsonl", [{"id": "good", "conversations": conversation("a", "a")}] * 4)
    path = write_jsonl(tmp_path / "samples_1.jsonl", [{"id": "strange"}])
    own = tmp_path / "own.yaml"
    own.write_text(f"include: [tiny]\ndata:\n  train: ['{tmp_path}/samples_${{oc.env:RANK}}.jsonl']\n")
    settings = [text for text in overrides(videos, tmp_path / "run") if not text.startswith("data.train")]
    status, said = launch(str(own), *settings, "train.global_batch_size=2", processes=2)
    assert status != 0
    assert said.count("megatron_vila: ") == 1, said
    assert f"1 of 1 records cannot be used:\n  {path}, line 1: nothing to train" in said
    # The launcher shows its own traceback, the processes none.
    assert str(REPOSITORY / "megatron_vila") not in said, said

"""What a user gets for bad settings, bad files and numbers that are not finite: one message with a cure, and all ranks end."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal

import pytest

from megatron_vila import accelerator
from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.data.chat import describe
from megatron_vila.plan.bounds import MOST
from megatron_vila.train import main
from megatron_vila.training.run_data import open_dataset
from megatron_vila.training.stop import ASKING
from megatron_vila.training.summary import read_metrics
from tests.data.material import conversation, cut_off, destroy_frames, write_jsonl
from tests.ranks import pool
from tests.training.real_run import REPOSITORY, Layout, launch, numbers, overrides


def _main(rank: int, world: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command on this rank."""
    out, err = io.StringIO(), io.StringIO()
    level = logging.getLogger("megatron_vila").level
    handlers = {asking: signal.getsignal(asking) for asking in ASKING}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    # Rates that give numbers which are not finite are refused: here it is tested what guards a run when they come all the same.
    MOST.update({"optim.lr": 1e300, "optim.vision.lr": 1e300})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        for asking, handler in handlers.items():
            signal.signal(asking, handler)
        logging.root.handlers.clear()
        logging.getLogger("megatron_vila").setLevel(level)
        logging.getLogger("megatron_vila.data").setLevel(logging.NOTSET)
        accelerator.set_deterministic(False)
    return status, out.getvalue(), err.getvalue()


def _run(layout: Layout, arguments: list[str]) -> tuple[int, str, str]:
    """The command on all ranks: its status, the same on each, and everything said by any."""
    ranks = pool.run(layout.world, _main, layout.world, ["tiny", *arguments, *layout.overrides()])
    (status,) = {status for status, _, _ in ranks}
    return status, "".join(out for _, out, _ in ranks), "".join(err for _, _, err in ranks)


def _refused(layout: Layout, arguments: list[str], *words: str) -> str:
    """The one message that the command ends with, on one rank; it holds ``words``."""
    status, _, err = _run(layout, arguments)
    assert status == 2, err
    assert err.count("megatron_vila: ") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    return err


def _as_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# ---------------------------------------------------------------------------------------------------------------------
# settings


def test_settings_that_do_not_fit_are_refused_with_a_cure(videos, tmp_path):
    good = overrides(videos, tmp_path / "run")
    two = Layout(2)
    _refused(Layout(2, ulysses=3), good, "world size 2 is not a multiple of", "start 3 processes")
    three_heads = [*good, "model.llm.head_dim=8", "model.llm.num_heads=3", "model.llm.num_kv_heads=3"]
    _refused(Layout(2, tp=2), three_heads, "tp=2", "3 query heads", "use")
    _refused(Layout(2, ulysses=2), three_heads, "ulysses=2", "3 query heads", "use")
    _refused(Layout(2, pp=2), [*good, "model.llm.num_layers=3"], "pp=2", "3", "use")
    _refused(two, [*good, "train.global_batch_size=3"], "train.global_batch_size=3", "use 2 or 4")
    _refused(two, [*good, "train.stepz=3"], "train.stepz", "train.steps")
    _refused(two, [*good, "train.steps=many"], "train.steps is 'many'", "whole number")
    _refused(two, [*good, "data.train=[nowhere.json]"], "data.train", "nowhere.json", "does not exist")
    _refused(two, [*good, "data.tokenizer=nowhere"], "data.tokenizer='nowhere' is not a folder")
    _refused(two, [*good, "checkpoint.load=nowhere"], "checkpoint.load='nowhere'")
    _refused(two, [*good, "optim.warmup_steps=100"], "optim.warmup_steps=100", "use at most 99")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_checkpoint_cannot_be_loaded(videos, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = overrides(videos, tmp_path / "run", f"checkpoint.load={tmp_path / 'empty'}")
    _refused(Layout(2), arguments, str(tmp_path / "empty"), "no finished checkpoint")


def _dry_run(arguments, *options):
    return pool.run(1, _main, 1, ["tiny", *arguments, "--dry-run", *options])[0]


def test_a_dry_run_says_what_it_checked_and_starts_nothing(videos, tmp_path):
    held_out = f"data.eval=[{videos / 'eval_3.json'}]"
    arguments = overrides(videos, tmp_path / "run", "parallel.ulysses=2", "train.precision=auto", held_out)
    status, out, err = _dry_run(arguments, "--world-size", "4", "--gpu", "h200")
    assert (status, err) == (0, "")
    assert "24 samples in" in out and "train_3.json" in out
    assert "data.eval: 8 samples in" in out
    assert "on an H200 with 139.8 GiB (planned for; --gpu names another)" in out
    assert "Start: random weights" in out
    assert "dry run for 4 ranks: everything fits together" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_any_sample_of_either_set_as_the_model_sees_it(videos, tmp_path):
    held_out = f"data.eval=[{videos / 'eval_3.json'}]"
    arguments = overrides(videos, tmp_path / "run", held_out)
    status, out, err = _dry_run(arguments, "--show", "9", "--show", "eval:7")
    assert (status, err) == (0, "")
    config = load_config("tiny", arguments)
    for name, index in (("train", 9), ("eval", 7)):
        dataset = open_dataset(config, name)
        assert f"number {index}:\n{describe(dataset.build(index).document, dataset.encoder.tokenizer)}\n" in out, name
    assert out.count("number ") == 2
    for show, words in (
        ("24", "--show 24 is not in data.train, which has samples 0 to 23"),
        ("eval:8", "--show 8 is not in data.eval, which has samples 0 to 7"),
        ("test:1", "--show test:1 must be the number of a sample"),
        ("-1", "--show -1 must be the number of a sample"),
        ("9" * 30, "must be the number of a sample"),
    ):
        status, _, err = _dry_run(arguments, f"--show={show}")
        assert status == 2 and words in err, err


def test_a_dry_run_looks_at_the_checkpoint_that_the_run_would_take(videos, tmp_path):
    one = overrides(videos, tmp_path / "one", "train.steps=1")
    assert _run(Layout(), one)[0] == 0
    _, out, err = _dry_run([*one, "train.steps=5"])
    assert "step-00000001 after step 1; 4 of train.steps=5 are left" in out, err
    assert "changed since: train.steps: 1 -> 5: the run ends there" in out
    status, _, err = _dry_run([*one, "train.steps=5", "model.llm.num_kv_heads=4"])
    assert status == 2 and "cannot load checkpoint" in err
    load = f"checkpoint.load={tmp_path / 'one'}"
    _, out, err = _dry_run(overrides(videos, tmp_path / "two", load))
    assert f"Start: weights of {latest_checkpoint(tmp_path / 'one')}" in out, err
    status, _, err = _dry_run(overrides(videos, tmp_path / "two", load, "model.llm.ffn_hidden_size=64"))
    assert status == 2
    assert "it is of another model than this configuration" in err and "linear_fc1.weight is [4, 64, 32]" in err
    for settings in (overrides(videos, tmp_path / "two", load), [*one, "train.steps=5"]):
        settings = [*settings, "model.llm.vocab_size=508"]
        words = "model.llm.vocab_size=508, and the checkpoint has a vocabulary of 512: rows from 508 on would be lost"
        status, _, err = _dry_run(settings)
        assert status == 2 and words in err, err
        assert _refused(Layout(), settings, words) == err
    # Frozen parts and the layout are no part of the model.
    other = ["optim.vision.trainable=false", "parallel.tp=2"]
    assert _dry_run(overrides(videos, tmp_path / "two", load, *other), "--world-size=2")[0] == 0
    (latest_checkpoint(tmp_path / "one") / ".metadata").unlink()
    status, _, err = _dry_run(overrides(videos, tmp_path / "two", load))
    assert status == 2 and "cannot load checkpoint" in err and ".metadata" in err


def test_a_dry_run_with_bad_input_ends_with_status_2(videos, tmp_path):
    for bad, words in (
        ("model.llm.num_kv_heads=3", "model.llm.num_kv_heads=3 does not divide"),
        (f"data.train=[{write_jsonl(tmp_path / 'bad.jsonl', [{'id': 'x'}])}]", "bad.jsonl, line 1"),
    ):
        arguments = overrides(videos, tmp_path / "run", bad)
        status, _, err = pool.run(1, _main, 1, ["tiny", *arguments, "--dry-run"])[0]
        assert status == 2 and words in err, err


# ---------------------------------------------------------------------------------------------------------------------
# files


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
    status, out, err = _dry_run(overrides(broken, tmp_path / "run"), "--show", "0", "4", "eval:2", "5", *data)
    assert (status, err) == (0, "")
    assert re.search(r"number 0 cannot be used \(broken\): .*00000.mp4: the file is empty", out)
    assert re.search(r"number 4 cannot be used \(broken\): .*00004.mp4: decoding frame ", out), "its pixels are read"
    assert re.search(r"number 2 cannot be used \(broken\): .*00002.mp4: ", out)
    assert out.count("(a run leaves it out)") == 2
    assert out.count("(an evaluation leaves it out)") == 1
    assert "number 1, the next that can be used:\n" in out and out.count("number 5") == 2 and "number 5:\n" in out
    assert "is broken and left out" not in out, "once is enough"
    status, out, _ = _dry_run([*overrides(broken, tmp_path / "run"), data[0]])
    assert status == 0 and "number 0 cannot be used" in out and "number 1, the next that can be used:\n" in out


@pytest.fixture(scope="module")
def broken_alone(broken, tmp_path_factory):
    """What one process makes of it."""
    output = tmp_path_factory.mktemp("broken_alone")
    status, said, err = _run(Layout(), _broken_arguments(broken, output))
    assert (status, err) == (0, "")
    return numbers(output), json.loads((output / "summary.json").read_text())


def _broken_arguments(broken, output):
    return overrides(broken, output, "data.shuffle=false", "train.steps=2", "data.max_broken=1", train=["6"])


@pytest.mark.parametrize("layout", [Layout(2, ulysses=2), Layout(2), Layout(4, tp=2, pp=2)], ids=str)
def test_a_broken_video_is_left_out_on_every_rank_counted_and_named_once(
    broken, broken_alone, tmp_path, layout
):
    """Under ulysses=2 only the second rank decodes the destroyed half of a video; two replicas each meet other videos."""
    status, said, err = _run(layout, _broken_arguments(broken, tmp_path))
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
    _refused(Layout(2, ulysses=2), arguments, "none of the 2 samples can be used", str(tmp_path / "0.mp4"))


def test_bad_records_are_told_in_one_report_and_left_out_or_end_the_run_as_the_setting_says(videos, tmp_path):
    good = json.loads((videos / "train_3.json").read_text())
    for record in good:
        record["video"] = str(videos / record["video"])
    bad = [{"id": "emoji", "conversations": conversation("\ud83d")}, *[{"id": n} for n in range(12)]]
    path = write_jsonl(tmp_path / "mixed.jsonl", [*good[:4], *bad])
    arguments = overrides(videos, tmp_path / "run", f"data.train=[{path}]", "train.steps=2", "data.max_broken=1")
    status, said, err = _run(Layout(2), [*arguments, "data.shuffle=false"])
    assert (status, err) == (0, "")
    assert said.count("13 of 17 records cannot be used:") == 1
    assert f"{path}, line 5, field 'conversations', turn 1:" in said and "... and 3 more" in said
    report = (tmp_path / "run/bad_records.txt").read_text().splitlines()
    assert len(report) == 13 and all(f"{path}, line {n}" in line for n, line in enumerate(report, start=5))
    assert json.loads((tmp_path / "run/summary.json").read_text())["left_out_broken"] == 13
    assert read_metrics(tmp_path / "run")[0][-1]["left_out_broken"] == 13
    status, said, err = pool.run(1, _main, 1, ["tiny", *arguments, "--dry-run"])[0]
    assert (status, err) == (0, "") and "13 of 17 records cannot be used:" in said
    arguments = overrides(videos, tmp_path / "stop", f"data.train=[{path}]", "data.bad_records=stop")
    _refused(Layout(2), arguments, "13 of 17 records cannot be used:", "... and 3 more", "data.bad_records=skip")
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
    assert _run(Layout(2), [*arguments, "train.steps=1", "data.max_broken=0.5"])[0] == 0
    words = ("9 of the 21 samples drawn in 2 steps were broken (42.9 %)", "data.max_broken=0.4", "check")
    _refused(Layout(2), [*arguments, "train.steps=2", "data.max_broken=0.4"], *words)
    assert latest_checkpoint(run).name == "step-00000002" and (run / "summary.json").exists()
    # On the way: from the 500th sample on, which the first packed step draws into its window.
    packed = [*arguments, f"train.output={tmp_path / 'packed'}", "data.packing=true", "train.seq_length=512", "train.steps=20"]
    _refused(Layout(2), [*packed, "data.max_broken=0.4"], "samples drawn in 1 steps were broken (49.9 %)")
    assert latest_checkpoint(tmp_path / "packed").name == "step-00000001"
    assert _run(Layout(2), [*packed, "data.max_broken=1", "train.steps=2"])[0] == 0
    # At the start: what is bad by its form is known before the first step.
    path = write_jsonl(tmp_path / "bad.jsonl", [*[records[0]] * 470, *[{"id": n} for n in range(30)]])
    words = ("30 of 500 records cannot be used", "more than data.max_broken=0.05 allows")
    _refused(Layout(2), overrides(videos, tmp_path / "none", f"data.train=[{path}]"), *words)


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
    assert _run(layout, overrides(videos, tmp_path / "cut", *more, train=["3", "6"]))[0] == 0
    summary = json.loads((tmp_path / "cut/summary.json").read_text())
    assert (summary["truncated"], summary["left_out_too_long"]) == (over_long, 0)
    assert summary["frames"] == 8 * 3 + 8 * 6 - over_long
    more += ("data.over_long=drop",)
    assert _run(layout, overrides(videos, tmp_path / "drop", *more, train=["3", "6"]))[0] == 0
    summary = json.loads((tmp_path / "drop/summary.json").read_text())
    assert summary["truncated"] == 0 and summary["left_out_too_long"] >= over_long
    assert summary["drawn"] == 16 + summary["left_out_too_long"], "others come in their place"
    _refused(layout, overrides(videos, tmp_path / "none", "train.seq_length=4"), "do not fit train.seq_length=4")


def test_an_epoch_without_a_supervised_token_ends_the_run(videos, tmp_path):
    records = [{"id": f"talk {i}", "conversations": conversation()[:1]} for i in range(4)]
    path = write_jsonl(tmp_path / "questions.jsonl", records)
    arguments = overrides(videos, tmp_path / "run", f"data.train=[{path}]", "train.global_batch_size=2")
    for layout in (Layout(2), Layout(2, pp=2)):
        _refused(layout, arguments, "a whole epoch of data.train", "questions.jsonl", "no supervised token")
    assert latest_checkpoint(tmp_path / "run") is None


# ---------------------------------------------------------------------------------------------------------------------
# numbers that are not finite


def _files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", [Layout(2, ulysses=2), Layout(2, pp=2), Layout(2)], ids=str)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_leaves_the_checkpoints_alone(videos, tmp_path, layout):
    good = overrides(videos, tmp_path, "train.steps=2", "optim.schedule=constant")
    assert _run(layout, good)[0] == 0
    before = _files_of(latest_checkpoint(tmp_path))
    # The third step is finite and throws the weights out of the range of float64.
    _refused(
        layout,
        [*good, "train.steps=6", "optim.lr=1e200", "checkpoint.save_every=4"],
        "loss nan", "step 4", "optim.lr=1e+200", "train.on_nan=stop", "train.on_nan=skip",
    )  # fmt: skip
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert _files_of(latest_checkpoint(tmp_path)) == before
    assert read_metrics(tmp_path)[0][-1]["loss"] is None
    assert _run(layout, [*good, "train.steps=3"])[0] == 0
    assert all(record["loss"] is not None for record in read_metrics(tmp_path)[0])


@pytest.fixture
def picture_then_text(videos, tmp_path):
    """Settings under which every picture gives a NaN after the first, as the tower's weights are enormous; text goes well."""
    (picture, *_) = json.loads((videos / "train_image.json").read_text())
    picture["image"] = str(videos / picture["image"])
    records = [picture, {"id": "text", "conversations": conversation()}]
    return (
        f"data.train=[{write_jsonl(tmp_path / 'mixed.jsonl', records)}]", "data.shuffle=false",
        "train.global_batch_size=1", "optim.vision.lr=1e200", "train.on_nan=skip",
    )  # fmt: skip


def test_updates_that_are_not_finite_are_skipped_and_counted_and_the_run_goes_on(videos, tmp_path, picture_then_text):
    run = tmp_path / "run"
    status, said, err = _run(
        Layout(2, ulysses=2), overrides(videos, run, *picture_then_text, "train.steps=6", "train.max_skips=1")
    )
    assert (status, err) == (0, "")
    steps = read_metrics(run)[0]
    assert [record["skipped"] for record in steps] == [0, 0, 1, 1, 2, 2]
    assert [record["loss"] is None for record in steps] == [False, False, True, False, True, False]
    assert steps[5]["loss"] < steps[1]["loss"]
    assert "update skipped (2 so far)" in _as_one_line(said)
    # The count belongs to the run, not to the process.
    assert _run(Layout(2, ulysses=2), overrides(videos, run, *picture_then_text, "train.steps=7"))[0] == 0
    assert read_metrics(run)[0][-1]["skipped"] == 3


def test_too_many_skipped_updates_in_a_row_end_the_run(videos, tmp_path):
    arguments = overrides(videos, tmp_path, "optim.lr=1e200", "train.on_nan=skip", "train.max_skips=2", "train.steps=9")
    _refused(Layout(2, tp=2), arguments, "3 updates skipped in a row, more than train.max_skips=2")
    assert latest_checkpoint(tmp_path) is None


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

"""Losses and updates that are not finite: the run stops or skips them as configured, on all ranks, and checkpoints stay whole."""

import json
import re

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.training.summary import read_metrics
from tests.data.material import conversation, write_jsonl
from tests.training.command_run import refused, run_command
from tests.training.real_run import Layout, overrides


def _files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", [Layout(2, ulysses=2), Layout(2, pp=2), Layout(2)], ids=str)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_leaves_the_checkpoints_alone(videos, tmp_path, layout):
    good = overrides(videos, tmp_path, "train.steps=2", "optim.schedule=constant")
    assert run_command(layout, good)[0] == 0
    before = _files_of(latest_checkpoint(tmp_path))
    # The third step is finite and throws the weights out of the range of float64.
    refused(
        layout,
        [*good, "train.steps=6", "optim.lr=1e200", "checkpoint.save_every=4"],
        "loss nan", "step 4", "optim.lr=1e+200", "train.on_nan=stop", "train.on_nan=skip",
    )  # fmt: skip
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert _files_of(latest_checkpoint(tmp_path)) == before
    assert read_metrics(tmp_path)[0][-1]["loss"] is None
    assert run_command(layout, [*good, "train.steps=3"])[0] == 0
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
    status, said, err = run_command(
        Layout(2, ulysses=2), overrides(videos, run, *picture_then_text, "train.steps=6", "train.max_skips=1")
    )
    assert (status, err) == (0, "")
    steps = read_metrics(run)[0]
    assert [record["skipped"] for record in steps] == [0, 0, 1, 1, 2, 2]
    assert [record["loss"] is None for record in steps] == [False, False, True, False, True, False]
    assert steps[5]["loss"] < steps[1]["loss"]
    assert "update skipped (2 so far)" in re.sub(r"\s+", " ", said)
    # The count belongs to the run, not to the process.
    assert run_command(Layout(2, ulysses=2), overrides(videos, run, *picture_then_text, "train.steps=7"))[0] == 0
    assert read_metrics(run)[0][-1]["skipped"] == 3


def test_too_many_skipped_updates_in_a_row_end_the_run(videos, tmp_path):
    arguments = overrides(videos, tmp_path, "optim.lr=1e200", "train.on_nan=skip", "train.max_skips=2", "train.steps=9")
    refused(Layout(2, tp=2), arguments, "3 updates skipped in a row, more than train.max_skips=2")
    assert latest_checkpoint(tmp_path) is None

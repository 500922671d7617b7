"""Held-out accuracy and loss are the same in every layout, and each held-out sample counts once."""

import json

import pytest

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.config.schema import Config
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.training.evaluate import HeldOut
from megatron_vila.training.feed import chance_level
from megatron_vila.training.summary import read_metrics
from tests.data.material import conversation, write_jsonl
from tests.ranks import pool
from tests.training.real_run import Layout, overrides, train

LAYOUTS = [
    Layout(2),
    Layout(2, tp=2),
    Layout(2, pp=2),
    Layout(2, ulysses=2),
    Layout(4),
    Layout(4, ring=2),
    Layout(4, tp=2, pp=2),
]
STEPS = 25
ZEROS = ("truncated", "left_out_broken", "left_out_too_long", "left_out_unanswered", "left_out_videos", "videos", "samples")


@pytest.fixture(scope="module")
def learned(videos, tmp_path_factory):
    """A model that answers red to everything, and five held-out samples of which three are: (run, file, results)."""
    output = tmp_path_factory.mktemp("learned")
    records = json.loads((videos / "eval_6.json").read_text()) + json.loads((videos / "eval_3.json").read_text())

    def write(name, chosen, answers):
        for record, answer in zip(chosen, answers, strict=True):
            record |= {"conversations": conversation("<video>\nName the colour.", answer)}
            record["video"] = str(videos / record["video"])
        return write_jsonl(output / name, chosen)

    teach = write("teach.jsonl", records[:3], ["red"] * 3)
    held_out = write("held_out.jsonl", records[6:11], ["red", "red", "red", "blue", "blue"])
    settings = overrides(videos, output, f"data.train=[{teach}]", f"data.eval=[{held_out}]", f"train.steps={STEPS}")
    pool.run(1, train, settings)
    return output, settings, read_metrics(output)[1][-1]


def test_one_process_counts_the_samples_whose_whole_answer_is_predicted(learned):
    _, _, results = learned
    assert (results["eval_accuracy"], results["eval_samples"], results["eval_chance"]) == (0.6, 5, 0.6)
    assert results["step"] == STEPS


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_accuracy_and_loss_of_one_process(learned, tmp_path, layout):
    """With data parallelism some replicas begin the held-out samples again to keep the others company: not counted."""
    output, settings, wanted = learned
    (tmp_path / "checkpoints").symlink_to(output / "checkpoints")
    # The run is at its last step already: it only evaluates.
    summaries = pool.run(layout.world, train, [*settings, f"train.output={tmp_path}", *layout.overrides()])
    assert summaries[0]["held_out_accuracy"] == 0.6
    (found,) = read_metrics(tmp_path)[1]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert latest_checkpoint(output).name == f"step-{STEPS:08d}"


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, pp=2)], ids=str)
def test_only_samples_that_were_tested_count_and_the_others_are_told(learned, videos, tmp_path, layout):
    """The model says red: one of the two tested samples is right, and no replacement is scored in the place of the others."""
    output, settings, _ = learned
    (tmp_path / "checkpoints").symlink_to(output / "checkpoints")
    held_out = [json.loads(line) for line in (output / "held_out.jsonl").read_text().splitlines()]
    red, blue = held_out[0], held_out[3]
    records = [
        {**red, "conversations": conversation("<video>\n" + "word " * 300, "red")},
        red,
        {**red, "video": "missing.mp4"},
        {**red, "video": "missing.mp4"},
        {**red, "conversations": "bad"},
        {**red, "conversations": conversation()[:1]},
        blue,
    ]
    path = write_jsonl(tmp_path / "mixed.jsonl", records)
    pool.run(layout.world, train, [*settings, f"train.output={tmp_path}", f"data.eval=[{path}]", *layout.overrides()])
    (found,) = read_metrics(tmp_path)[1]
    numbers = {name.removeprefix("eval_"): value for name, value in found.items()}
    assert (numbers["accuracy"], numbers["samples"], numbers["videos"], numbers["chance"]) == (0.5, 2, 2, 0.5)
    left_out = {name: numbers[f"left_out_{name}"] for name in ("too_long", "broken", "unanswered", "videos")}
    assert left_out == {"too_long": 1, "broken": 3, "unanswered": 1, "videos": 4}
    (line,) = HeldOut(Config()).remarks(numbers)
    assert "5 of 7 held-out samples are left out of all numbers: 3 broken (the log names them), 1 do not fit" in line
    # The loss is that of the two tested samples alone.
    path = write_jsonl(tmp_path / "two.jsonl", [red, blue])
    pool.run(1, train, [*settings, f"train.output={tmp_path}", f"data.eval=[{path}]"])
    assert read_metrics(tmp_path)[1][-1]["eval_loss"] == pytest.approx(numbers["loss"], rel=1e-9)


def test_an_evaluation_in_which_nothing_could_be_tested_has_no_accuracy_and_ends_nothing(learned, tmp_path):
    output, settings, _ = learned
    (tmp_path / "checkpoints").symlink_to(output / "checkpoints")
    missing = [{"id": str(n), "video": "no.mp4", "conversations": conversation()} for n in range(3)]
    path = write_jsonl(tmp_path / "missing.jsonl", missing)
    (summary,) = pool.run(1, train, [*settings, f"train.output={tmp_path}", f"data.eval=[{path}]"])
    (found,) = read_metrics(tmp_path)[1]
    assert "eval_accuracy" not in found and "held_out_accuracy" not in summary
    numbers = {name.removeprefix("eval_"): value for name, value in found.items()}
    assert (numbers["samples"], numbers["left_out_broken"], numbers["left_out_videos"]) == (0, 3, 3)
    said = " ".join(HeldOut(Config()).remarks(numbers))
    assert "no held-out video was tested: all 3 were left out" in said and "no held-out sample was tested" in said


def test_samples_tested_with_fewer_frames_are_told():
    (line,) = HeldOut(Config()).remarks(dict.fromkeys(ZEROS, 0) | {"samples": 5, "truncated": 2})
    assert line == "2 held-out samples were tested with fewer frames than asked for, to fit train.seq_length"


def test_chance_is_that_of_giving_the_most_frequent_answers_whatever_else_a_record_says(tmp_path):
    def record(*turns):
        return {"id": "r", "conversations": [{"from": who, "value": text} for who, text in turns]}

    records = [
        record(("human", "Name two colours."), ("gpt", "red"), ("human", "And?"), ("gpt", "blue")),
        record(("human", "Once more?"), ("gpt", "red"), ("human", "And?"), ("gpt", "blue"), ("human", "Thanks.")),
        record(("human", "A colour?"), ("gpt", "blue")),
        record(("human", "Nobody answers.")),
    ]
    files = JsonFiles([write_jsonl(tmp_path / "four.jsonl", records)])
    assert chance_level(files, range(4)) == 2 / 3
    assert chance_level(files, [1, 2]) == 1 / 2, "of the samples that were tested"
    assert chance_level(files, [3]) == 0

"""Held-out accuracy and loss are the same in every layout, and each held-out sample counts once."""

import json

import pytest

from megatron_vila.training.checkpoint import latest_checkpoint
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


@pytest.fixture(scope="module")
def learnt(videos, tmp_path_factory):
    """A model that answers red to everything, and five held-out samples of which three are: (run, file, results)."""
    output = tmp_path_factory.mktemp("learnt")
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


def test_one_process_counts_the_samples_whose_whole_answer_is_predicted(learnt):
    _, _, results = learnt
    assert (results["eval_accuracy"], results["eval_samples"], results["eval_chance"]) == (0.6, 5, 0.6)
    assert results["step"] == STEPS


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_accuracy_and_loss_of_one_process(learnt, tmp_path, layout):
    """With data parallelism some replicas begin the held-out samples again to keep the others company: not counted."""
    output, settings, wanted = learnt
    (tmp_path / "checkpoints").symlink_to(output / "checkpoints")
    # The run is at its last step already: it only evaluates.
    summaries = pool.run(layout.world, train, [*settings, f"train.output={tmp_path}", *layout.overrides()])
    assert summaries[0]["held_out_accuracy"] == 0.6
    (found,) = read_metrics(tmp_path)[1]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert latest_checkpoint(output).name == f"step-{STEPS:08d}"


def test_chance_is_that_of_giving_the_most_frequent_answers_whatever_else_a_record_says(tmp_path):
    def record(*turns):
        return {"id": "r", "conversations": [{"from": who, "value": text} for who, text in turns]}

    records = [
        record(("human", "Name two colours."), ("gpt", "red"), ("human", "And?"), ("gpt", "blue")),
        record(("human", "Once more?"), ("gpt", "red"), ("human", "And?"), ("gpt", "blue"), ("human", "Thanks.")),
        record(("human", "A colour?"), ("gpt", "blue")),
        record(("human", "Nobody answers.")),
    ]
    assert chance_level([write_jsonl(tmp_path / "four.jsonl", records)], "") == 2 / 3
    assert chance_level([write_jsonl(tmp_path / "none.jsonl", records[3:])], "") == 0

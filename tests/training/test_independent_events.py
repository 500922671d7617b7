"""What happens to a run, against the independent truth: a resume, a skipped update, samples that do not work, an evaluation."""

import pytest
import torch

from megatron_vila.training.summary import read_metrics
from tests.ranks import pool
from tests.training.independent import files, model
from tests.training.independent.data import Rows
from tests.training.independent.loop import Recipe, Run, evaluation
from tests.training.independent.samples import Pictures
from tests.training.truth_sides import (
    LONGEST,
    World,
    cut_back,
    same_steps,
    same_totals,
    same_weights,
    trained,
    weights_of,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


ODD = [
    files.record("good", "<video>Which colour?", "Red", video="long.mp4"),
    files.record("cut off", "<video>Nothing to see", "no", video="cut.mp4"),
    files.record("text", "Say a.", "a"),
    files.record("long film", "<video>" + "Is that so? " * 8, "It is.", video="long.mp4"),
    files.record("long text", "Word " * 40, "Yes"),
    files.record("unsupervised", "<image>Who?", image="turned.jpg"),
    files.record("still", "<image>Day?", "No.", image="wide.jpg"),
]


@pytest.mark.parametrize("resumed_after", [2, None], ids=["resumed", "straight on"])
def test_samples_that_do_not_work_are_left_out_and_counted_also_over_a_resume(world, tmp_path, resumed_after):
    recipe, pictures = Recipe(seed=88), Pictures()
    imported = world.random("qwen2")
    more = ("checkpoint.save_every=2", "checkpoint.keep=0", "data.max_broken=1")
    settings = world.settings(recipe, pictures, world.write("odd", ODD), tmp_path / "run", *more)
    (summary,) = pool.run(1, trained, imported / "config.yaml", settings)
    if resumed_after:
        cut_back(tmp_path / "run", resumed_after)
        (summary,) = pool.run(1, trained, imported / "config.yaml", settings)
    rows = Rows(ODD, world.folder, pictures, LONGEST, recipe.seed)
    truth = Run(model.Vila(model.QWEN2).load(imported.with_suffix(".hf")), recipe, rows)
    same_steps(tmp_path / "run", [truth.step() for _ in range(recipe.steps)])
    same_weights(weights_of(tmp_path / "run", tmp_path / "out"), truth)
    counts, early = rows.count(0, 10), rows.count(0, 4)
    assert all(early.values())
    assert {name: summary[name] for name in counts} == counts


def test_a_sample_whose_frames_cannot_be_decoded_is_left_out_of_its_packed_row_and_the_step_is_packed_anew(world, tmp_path):
    """Its frames are counted, so that only decoding finds out."""
    records = [
        files.record("wreck", "<video>?", "b", video="wreck.mp4"),
        files.record("one", "<image>Is this the one that I saw?", "Yes", image="turned.jpg"),
        files.record("two", "<image>Is this the one that I saw?", "No, not at all", image="wide.jpg"),
        files.record("three", "What shall I say now to be long enough?", "Nothing, I think, is best"),
    ]
    recipe, pictures = Recipe(seed=2), Pictures(num_frames=2)
    imported = world.random("qwen2")
    settings = world.settings(
        recipe, pictures, world.write("wreck", records), tmp_path / "run", "data.packing=true", "data.max_broken=1"
    )
    (summary,) = pool.run(1, trained, imported / "config.yaml", settings)
    rows = Rows(records, world.folder, pictures, LONGEST, recipe.seed, packed=True)
    truth = Run(model.Vila(model.QWEN2).load(imported.with_suffix(".hf")), recipe, rows)
    same_steps(tmp_path / "run", [truth.step() for _ in range(recipe.steps)])
    counts = rows.count(0, 10)
    assert counts["left_out_broken"] and {name: summary[name] for name in counts} == counts


@pytest.mark.parametrize("resumed_after", [3, None], ids=["resumed", "straight on"])
def test_a_skipped_update_changes_nothing_and_the_schedule_goes_on(world, tmp_path, resumed_after):
    """The embedding of one byte is infinite: the step that meets it has no finite gradient."""
    records = [files.record(f"text {k}", f"Say {k}.", "a" * (k + 1)) for k in range(4)]
    records.append(files.record("poison", "<image>~", "no", image="wide.jpg"))
    recipe, pictures = Recipe(steps=6, rows=1, seed=1), Pictures()
    poisoned = model.randomized(model.QWEN2, seed=5)
    with torch.no_grad():
        poisoned.llm.get_input_embeddings().weight[3 + ord("~")] = torch.inf
    imported = world.folder / "poisoned"
    if not imported.exists():
        world.imported(poisoned, "poisoned")
    more = ("train.on_nan=skip", "checkpoint.save_every=3", "checkpoint.keep=0")
    settings = world.settings(recipe, pictures, world.write("poison", records), tmp_path / "run", *more)
    (summary,) = pool.run(1, trained, imported / "config.yaml", settings)
    if resumed_after:
        cut_back(tmp_path / "run", resumed_after)
        (summary,) = pool.run(1, trained, imported / "config.yaml", settings)
    truth = Run(poisoned, recipe, Rows(records, world.folder, pictures, LONGEST, recipe.seed, rows=recipe.rows))
    wanted = [truth.step() for _ in range(recipe.steps)]
    assert [step["skipped"] for step in wanted] == [0, 0, 1, 1, 1, 1]
    same_steps(tmp_path / "run", wanted)
    same_totals(summary, wanted)
    same_weights(weights_of(tmp_path / "run", tmp_path / "out"), truth)


def test_an_evaluation_judges_each_held_out_sample_once_and_no_replacement(world, tmp_path):
    teach = [files.record("picture", "<image>Day?", "No.", image="wide.jpg")]
    held_out = [
        files.record("right", "<image>Day?", "No.", image="wide.jpg"),
        files.record("broken", "<video>Day?", "Now", video="cut.mp4"),
        files.record("also right", "<image>Day?", "No.", image="turned.jpg"),
        files.record("half right", "<image>Day?", "Now", image="wide.jpg"),
        files.record("too long", "Word " * 40, "Never"),
        files.record("wrong", "<video>" + "Is that so? " * 8, "Never", video="short.mp4"),
        files.record("unanswered", "<image>Day?", image="wide.jpg"),
    ]
    pictures = Pictures()
    taught = model.randomized(model.QWEN2, seed=6)
    lesson = Rows(teach, world.folder, pictures, LONGEST, seed=0)
    teaching = Run(taught, Recipe(steps=40, rows=1, lr=0.03, min_lr=0.03), lesson)
    for _ in range(25):
        teaching.step()
    imported = world.imported(taught, "taught")
    recipe = Recipe(steps=2, rows=1, lr=1e-5, rates={}, min_lr=1e-6, warmup=1)
    more = (f"data.eval={world.write('held_out', held_out)}",)
    settings = world.settings(recipe, pictures, world.write("teach", teach), tmp_path / "run", *more)
    pool.run(1, trained, imported / "config.yaml", settings)
    truth = Run(model.Vila(model.QWEN2).load(imported.with_suffix(".hf")), recipe, lesson)
    for _ in range(recipe.steps):
        truth.step()
    good = Rows([held_out[k] for k in (0, 2, 3, 5)], world.folder, pictures, LONGEST, seed=0).samples
    wanted = evaluation(truth.model, good, ["No.", "No.", "Now", "Never"])
    assert wanted["eval_accuracy"] == 0.5
    (found,) = read_metrics(tmp_path / "run")[1]
    names = ("videos", "truncated", "left_out_broken", "left_out_too_long", "left_out_unanswered", "left_out_videos")
    wanted |= {f"eval_{name}": 1 for name in names}
    assert found == pytest.approx({"step": 2, **wanted}, rel=1e-8)

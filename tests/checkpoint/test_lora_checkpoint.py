"""Checkpoints with LoRA: exact resume under any layout, a start from weights without updates, and updates that are never lost."""

import shutil

import pytest
import torch

from megatron_vila.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_vila.config.schema import LoraConfig
from megatron_vila.errors import CheckpointError
from tests.checkpoint.test_checkpoint import ONE, PP2, RING2, TP2, TP2_PP2, TP2_RING2, check, content
from tests.ranks import pool
from tests.training.real_run import Layout, numbers, overrides, train, weights
from tests.training.small_run import build

ALL = ["qkv", "proj", "fc1", "fc2"]
STAGE_4 = LoraConfig(rank=3, targets=ALL, also_train=["embeddings", "norms"])


@pytest.mark.parametrize("saved_with", [ONE, TP2, PP2], ids=str)
def test_updates_and_their_optimizer_state_load_exactly_under_other_layouts(tmp_path, saved_with):
    loaded_with = {ONE: [ONE, TP2, PP2], TP2: [ONE, TP2, TP2_RING2], PP2: [PP2, TP2_PP2]}[saved_with]
    check(tmp_path, saved_with, loaded_with, tied=saved_with == PP2, model__lora=STAGE_4)


def test_updates_in_bfloat16_resume_bitwise_from_their_float32_copies(tmp_path):
    check(tmp_path, TP2, [TP2, RING2], torch.bfloat16, model__lora=LoraConfig(rank=2, targets=ALL))
    (tensors,) = pool.run(1, content, str(tmp_path))
    learned = {key.rpartition(".")[2] for key in tensors if key.startswith("optimizer.") and ".llm." in key}
    assert learned == {"lora_a", "lora_b"}


def save(rank, layout, folder, changes):
    run = build(layout, **changes)
    run.step(0)  # the warm-up begins with rate 0
    run.step(1)
    save_checkpoint(folder, 2, [run.ddp], run.optimizer, run.scheduler)


def load(rank, layout, folder, changes, with_optimizer=False):
    """Names of the parameters of a new run that loading left as they were."""
    run = build(layout, train__seed=99, **changes)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    state = (run.optimizer, run.scheduler) if with_optimizer else ()
    load_checkpoint(folder, [run.ddp], *state)
    # Vectors begin as constants, so another seed does not tell whether they were loaded.
    return {name for name, p in run.model.named_parameters() if p.dim() > 1 and torch.equal(p, before[name])}


def refusal(rank, *arguments):
    with pytest.raises(CheckpointError) as refused:
        load(rank, *arguments)
    return str(refused.value)


@pytest.mark.parametrize("layout", [ONE, TP2, PP2], ids=str)
def test_a_checkpoint_without_updates_starts_a_run_with_updates_at_their_initial_values(tmp_path, layout):
    pool.run(1, save, ONE[1], str(tmp_path), {})
    for kept in pool.run(*layout[:1], load, layout[1], str(tmp_path), {"model__lora": STAGE_4}):
        assert {name.rpartition(".")[2] for name in kept} == {"lora_a", "lora_b"}
        assert len(kept) == 2 * 4 * (1 if layout == PP2 else 2)


def test_more_layers_get_updates_and_the_old_ones_go_on(tmp_path):
    pool.run(1, save, ONE[1], str(tmp_path), {"model__lora": LoraConfig(rank=3, targets=["qkv"])})
    (kept,) = pool.run(1, load, ONE[1], str(tmp_path), {"model__lora": LoraConfig(rank=3, targets=["qkv", "fc1"])})
    assert {name.split(".")[-2] for name in kept} == {"linear_fc1"}


@pytest.mark.parametrize(
    ("saved", "loaded", "with_optimizer", "parts"),
    [
        (
            {"model__lora": STAGE_4},
            {},
            False,
            ["8 LoRA tensors that the model has no place for: llm.decoder.layers.mlp.linear_fc1.lora_a", "merge them"],
        ),
        (
            {"model__lora": LoraConfig(rank=3)},
            {"model__lora": LoraConfig(rank=3, targets=["proj"])},
            False,
            ["2 LoRA tensors that the model has no place for", "linear_qkv.lora_b"],
        ),
        (
            {"model__lora": LoraConfig(rank=3)},
            {"model__lora": LoraConfig(rank=4)},
            False,
            ["4 tensors of another shape", "self_attention.linear_proj.lora_a [2, 3, 32] instead of [2, 4, 32]"],
        ),
        ({"model__llm__qkv_bias": False}, {"model__lora": STAGE_4}, False, ["1 tensors missing", "linear_qkv.bias"]),
        ({}, {"model__lora": LoraConfig(rank=3)}, True, ["tensors missing", "linear_qkv.lora_a"]),
    ],
    ids=["no updates", "fewer updates", "another rank", "something else is missing", "a resumed run"],
)
def test_what_does_not_fit_is_named(tmp_path, saved, loaded, with_optimizer, parts):
    pool.run(1, save, ONE[1], str(tmp_path), saved)
    (said,) = pool.run(1, refusal, ONE[1], str(tmp_path), loaded, with_optimizer)
    assert all(part in said for part in parts)


# ---------------------------------------------------------------------------------------------------------------------
# the trainer

STEPS, STOP = 4, 2
RUN = ("train.precision=fp32", "data.packing=true", f"train.steps={STEPS}", f"checkpoint.save_every={STOP}")
LORA = ("model.lora.rank=4", "model.lora.targets=[qkv,proj,fc1,fc2]", "model.lora.also_train=[embeddings,norms]")
FROZEN = ("optim.vision.trainable=false", "optim.projector.trainable=false")


@pytest.fixture(scope="module")
def started(videos, tmp_path_factory):
    """A run with LoRA from the weights of a run without: settings, its folder, weights before and after."""
    folder = tmp_path_factory.mktemp("lora")
    base = overrides(videos, folder / "base", *RUN)
    pool.run(1, train, base)
    settings = overrides(videos, folder / "run", *RUN, *LORA, *FROZEN, f"checkpoint.load={folder / 'base'}")
    pool.run(1, train, settings)
    before, after = pool.run(1, weights, base, folder / "base")[0], pool.run(1, weights, settings, folder / "run")[0]
    return settings, folder / "run", before, after


def test_a_run_with_lora_changes_the_updates_embeddings_and_norms_and_nothing_else(started):
    *_, before, after = started
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {name for name in before if "word_embeddings" in name or "layernorm" in name and "llm" in name}
    added = {name: weight for name, weight in after.items() if name not in before}
    assert len(added) == 2 * 4 * 4 and all(weight.any() for weight in added.values())


@pytest.mark.parametrize("layout", [Layout(1), Layout(2, tp=2), Layout(4, pp=2, ring=2)], ids=str)
def test_a_run_with_lora_that_was_stopped_goes_on_in_any_layout(started, tmp_path, layout):
    settings, run, _, wanted = started
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.rmtree(output / f"checkpoints/step-{STEPS:08d}")
    (output / "checkpoints/latest").write_text(f"step-{STOP:08d}\n")
    settings = [*settings, f"train.output={output}"]
    pool.run(layout.world, train, [*settings, *layout.overrides()])
    found = pool.run(1, weights, settings, output)[0]
    if layout == Layout(1):
        assert numbers(output) == numbers(run)
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    for step, expected in zip(numbers(output), numbers(run), strict=True):
        assert step == pytest.approx(expected, rel=2e-5)
    for name, weight in wanted.items():
        assert (found[name] - weight).abs().max() <= 2e-5 * weight.abs().max().clamp(min=1e-2), name

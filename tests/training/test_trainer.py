"""Losses, weights and counts of a few steps of the real trainer do not depend on the layout."""

import gc

import pytest
import torch

from megatron_vila.training.trainer import Trainer, slower_parts
from tests import samples
from tests.ranks import pool
from tests.training.real_run import Layout, numbers, overrides, train, weights

LAYOUTS = [
    Layout(2),
    Layout(2, tp=2),
    Layout(2, pp=2),
    Layout(2, ulysses=2),
    Layout(2, ring=2),
    Layout(4, ulysses=2, ring=2),
    Layout(4, tp=2, pp=2),
    Layout(4, pp=2, ring=2),
    Layout(4, tp=2),
    Layout(4, ulysses=2),
]
SETTINGS = ("data.packing=true", "train.steps=3")


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory):
    """One process: what its steps came to and its final weights."""
    output = tmp_path_factory.mktemp("alone")
    settings = overrides(videos, output, *SETTINGS)
    pool.run(1, train, settings)
    return numbers(output), pool.run(1, weights, settings, output)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_takes_the_same_steps_in_every_layout(videos, tmp_path, alone, layout):
    settings = overrides(videos, tmp_path, *SETTINGS, *layout.overrides())
    pool.run(layout.world, train, settings)
    for step, wanted in zip(numbers(tmp_path), alone[0], strict=True):
        assert step == pytest.approx(wanted, rel=1e-9)
    found = pool.run(1, weights, settings, tmp_path)[0]
    for name, weight in alone[1].items():
        assert (found[name] - weight).abs().max() <= 1e-8, name


def passed_over(rank, settings):
    """Objects that a full collection would pass over in each step, and those that stay out of it after the run."""
    seen, measure = [], Trainer._measure

    def counted(self, *arguments):
        seen.append(len(gc.get_objects()))
        return measure(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_measure", counted)
        train(rank, settings)
    return seen, gc.get_freeze_count()


def test_after_its_first_step_a_run_is_not_halted_by_collections_of_what_stays(videos, tmp_path):
    for (first, *later), kept_out in pool.run(2, passed_over, overrides(videos, tmp_path, *SETTINGS)):
        assert len(later) == 2 and max(later) < first / 10
        assert kept_out == 0


def test_a_gpu_without_the_fastest_parts_hears_which_run_and_why(monkeypatch):
    absent = {"fa4": "the package flash-attn-4 is not installed", "cudnn": None}
    monkeypatch.setattr("megatron_vila.parallel.kernels.KERNELS", {name: (lambda *_, r=r: r, None) for name, r in absent.items()})
    monkeypatch.setattr("megatron_vila.training.trainer.reason_for_apart", lambda device: "no quack-kernels here")
    config, gpu, bf16 = samples.config(), torch.device("cuda", 0), torch.bfloat16
    config.model.attention = "auto"
    apart = "SwiGLU apart from the products around it: no quack-kernels here"
    assert slower_parts(config, "cudnn", bf16, gpu) == [f"attention by cudnn, not fa4: {absent['fa4']}", apart]
    assert slower_parts(config, "fa4", bf16, gpu) == [apart]
    config.model.attention = "cudnn"  # as asked for
    assert slower_parts(config, "cudnn", bf16, gpu) == [apart]
    assert slower_parts(config, "cpu", bf16, torch.device("cpu")) == slower_parts(config, "reference", torch.float64, gpu) == []

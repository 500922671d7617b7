"""A VILA for transformers under DDP and FSDP2: batches with and without pictures side by side train as in one process."""

import pytest
import torch

from tests.hf import vila_ranks
from tests.hf.megatron_side import config, export
from tests.ranks import pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pool.run(1, export, config(folder), folder, ("flat",))
    return str(folder / "flat")


# Pictures of each rank in each step; the tower takes 16 at once where nothing is learned of them.
STEPS = [[3, 0], [0, 1], [0, 0], [18, 2]]


@pytest.mark.parametrize(("weights", "frozen"), [*((one, False) for one in vila_ranks.WEIGHTS), ("fsdp2, every layer", True)])
def test_ranks_with_and_without_pictures_train_as_one_process(folder, weights, frozen):
    wanted_losses, wanted = vila_ranks.alone(folder, STEPS, frozen)
    before = vila_ranks.load(folder, frozen).state_dict()
    moved = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    assert any("vision_tower" in name for name in moved) is not frozen
    for losses, found in pool.run(2, vila_ranks.train, folder, STEPS, weights, frozen):
        assert losses == pytest.approx(wanted_losses, rel=1e-9)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert torch.allclose(found[name], wanted[name], rtol=1e-7, atol=1e-9), name


def test_layers_that_nothing_runs_are_carried_whatever_is_asked_to_be_trained(folder):
    model = vila_ranks.load(folder, frozen=False)
    model(**vila_ranks.batch(2, 0)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    carried = model.state_dict().keys() - dict(model.named_parameters()).keys()
    assert {name.split("vision_model.")[1].partition(".")[0] for name in carried} == {"encoder", "post_layernorm", "head"}
    assert {name.split(".")[5] for name in carried if "encoder" in name} == {"2"}


def test_a_text_alone_is_answered_without_the_tower(folder):
    model, calls = vila_ranks.load(folder, frozen=False).eval(), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**vila_ranks.batch(0, 0))
    model.generate(**{"input_ids": vila_ranks.batch(0, 0)["input_ids"]}, max_new_tokens=2)
    assert calls == []
    model(**vila_ranks.batch(0, 0))
    assert calls == [1], "a gradient may be asked for"

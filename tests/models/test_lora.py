"""LoRA's parameters: where they begin, what learns, and that a model with fresh updates is the model without them.

Gradients in every layout: ``tests/parallel/test_lora_contract.py``; checkpoints: ``tests/checkpoint/test_lora_checkpoint.py``.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vila.config.schema import LoraConfig, ParallelConfig
from megatron_vila.models.initialize import global_name, tensor_parallel_slice
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import pack
from megatron_vila.plan.sizes import lora_layer_parameters
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

CPU = torch.device("cpu")
ALL = LoraConfig(rank=3, targets=["qkv", "proj", "fc1", "fc2"])


def build(parallel: ParallelConfig, lora: LoraConfig, tied: bool = False) -> tuple[ParallelTopology, VilaModel]:
    config = samples.config(layers=2, tied=tied)
    config.model.lora = lora
    topology = ParallelTopology.create(parallel)
    model_parallel_cuda_manual_seed(1)
    return topology, VilaModel(config, topology, torch.float32, CPU)


def write_weights(rank, lora, path):
    topology, model = build(ParallelConfig(), lora)
    topology.destroy()
    torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, path)


def different_weights(rank, parallel, path):
    """Names of this rank's parameters that are not the slices of the whole model's."""
    topology, model = build(parallel, ALL)
    grid, place = topology.grid, topology.place
    topology.destroy()
    whole = torch.load(path, weights_only=True)
    different = []
    for local, parameter in model.named_parameters():
        name = global_name(local, place.pp * 2 // grid.pp)
        if not torch.equal(parameter, tensor_parallel_slice(whole[name], name, parameter, grid.tp, place.tp)):
            different.append(name)
    return different


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig(ulysses=2)], ids=str)
def test_updates_begin_bitwise_the_same_in_every_layout(parallel, tmp_path):
    pool.run(1, write_weights, ALL, tmp_path / "whole.pt")
    assert pool.run(2, different_weights, parallel, tmp_path / "whole.pt") == [[], []]


def test_updates_leave_the_other_weights_as_they_are_and_begin_with_zero_b_and_random_a(tmp_path):
    pool.run(1, write_weights, ALL, tmp_path / "with.pt")
    pool.run(1, write_weights, LoraConfig(), tmp_path / "without.pt")
    found, base = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(found[name], weight) for name, weight in base.items())
    factors = {name: weight for name, weight in found.items() if name not in base}
    assert len(factors) == 2 * 4 * 2
    for name, weight in factors.items():
        outputs, inputs = base[f"{name.rpartition('.')[0]}.weight"].shape
        if name.endswith("lora_b"):
            assert weight.shape == (outputs, 3) and not weight.any()
        else:
            assert weight.shape == (3, inputs)
            assert weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.5)


def loss_of(rank, lora):
    topology, model = build(ParallelConfig(), lora)
    row = pack([samples.document("text", "t" * 30)], 2, 2)
    shard = contract.shard_of(row, topology, samples.config().model.llm, torch.float32)
    topology.destroy()
    return model(shard, contract.made(model, samples.pixels([]).float())).loss_sum.item()


def test_a_model_with_fresh_updates_computes_what_it_computes_without_them():
    assert pool.run(1, loss_of, ALL) == pool.run(1, loss_of, LoraConfig())


def learning(rank, parallel, lora, tied):
    """Names of the language model's parameters that learn on this rank, without the layers' numbers."""
    topology, model = build(parallel, lora, tied)
    topology.destroy()
    names = {
        name.split("layers.")[-1].lstrip("0123456789.") for name, p in model.llm.named_parameters() if p.requires_grad
    }
    return names, sum(p.numel() for p in model.llm.decoder.layers.parameters() if p.requires_grad)


FACTORS = {f"self_attention.linear_{name}.lora_{factor}" for name in ("qkv", "proj") for factor in "ab"}
NORMS = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}


@pytest.mark.parametrize("tied", [False, True], ids=["own_output", "tied_output"])
def test_only_the_updates_and_what_is_named_beside_them_learn(tied):
    for also_train, first, last in (
        ([], set(), set()),
        (["norms"], NORMS, {*NORMS, "decoder.final_layernorm.weight"}),
        (["embeddings"], {"embedding.word_embeddings.weight"}, {"output_layer.weight"} if tied else set()),
    ):
        found = pool.run(2, learning, ParallelConfig(pp=2), LoraConfig(rank=2, also_train=also_train), tied)
        assert [names for names, _ in found] == [FACTORS | first, FACTORS | last]


@pytest.mark.parametrize("tp", [1, 2])
def test_the_counted_parameters_of_the_updates_are_those_of_the_model(tp):
    model = samples.config().model
    for targets in (ALL.targets, ["qkv", "fc2"], ["proj"]):
        model.lora = LoraConfig(rank=3, targets=targets)
        for _, count in pool.run(tp, learning, ParallelConfig(tp=tp), model.lora, False):
            assert count == 2 * lora_layer_parameters(model, tp)
    model.lora.rank = 0
    assert lora_layer_parameters(model, tp) == 0

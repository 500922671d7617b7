"""The gradient contract with LoRA: loss and every gradient of what learns equal the single-process truth."""

from __future__ import annotations

import pytest

from megatron_vila.config.schema import LoraConfig, MemoryConfig, ParallelConfig
from tests import samples
from tests.parallel.test_gradient_contract import DOCUMENTS, MIXED_ROWS, SPREAD, Truths, layouts, name

ALL = ["qkv", "proj", "fc1", "fc2"]
ROWS = MIXED_ROWS[:4]


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> Truths:
    return Truths(tmp_path_factory.mktemp("truth"))


def config(lora: LoraConfig, tied: bool = False, **trainable: bool):
    """Tower and projector frozen unless said otherwise, as in stage 4."""
    config = samples.config(layers=4, tied=tied)
    config.model.lora = lora
    config.optim.vision.trainable = trainable.get("vision", False)
    config.optim.projector.trainable = trainable.get("projector", False)
    return config


EVERY_AXIS = [
    (1, ParallelConfig()),
    *((2, p) for p in layouts(2)),
    (4, ParallelConfig(tp=4)),
    *((4, p) for p in SPREAD),
]


@pytest.mark.parametrize(("world", "parallel"), [pytest.param(w, p, id=f"world{w}-{name(p)}") for w, p in EVERY_AXIS])
def test_updates_of_all_linear_layers_keep_the_contract_on_every_axis(truths, world, parallel):
    everything = config(LoraConfig(rank=3, alpha=5.0, targets=ALL), vision=True, projector=True)
    truths.check("all", everything, ROWS, world, parallel)


@pytest.mark.parametrize("tied", [False, True], ids=["own_output", "tied_output"])
@pytest.mark.parametrize("also_train", [[], ["norms"], ["embeddings", "norms"]], ids="+".join)
def test_the_contract_holds_for_what_learns_beside_the_updates(truths, also_train, tied):
    stage_4 = config(LoraConfig(rank=2, also_train=also_train), tied=tied)
    truths.check(f"beside-{'-'.join(also_train)}-{tied}", stage_4, ROWS, 4, ParallelConfig(tp=2, pp=2))


@pytest.mark.parametrize("target", ALL)
def test_the_contract_holds_for_an_update_of_one_kind_of_layer(truths, target):
    truths.check(
        f"only-{target}", config(LoraConfig(rank=1, targets=[target])), ROWS[:2], 4, ParallelConfig(tp=2, ulysses=2)
    )


POLICIES = {
    "full": {"recompute": "full"},
    "blocks of 3, tiles, all on the host": {
        "recompute": "attention_output", "block_layers": 3, "mlp_tile": 5, "offload_gib": 1.0
    },
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parallel", SPREAD, ids=name)
def test_the_contract_holds_for_updates_under_memory_policies(truths, parallel, policy):
    recomputed = config(LoraConfig(rank=3, alpha=5.0, targets=ALL), projector=True)
    recomputed.memory = MemoryConfig(**POLICIES[policy])
    truths.check("recomputed", recomputed, ROWS, 4, parallel)


def test_the_contract_holds_for_a_step_without_labels(truths):
    truths.check(
        "no-labels", config(LoraConfig(rank=2, targets=ALL)), [[DOCUMENTS["no_labels"]]], 2, ParallelConfig(tp=2)
    )

"""The gradient contract: in every layout, loss and every parameter gradient equal the single-process truth.

All in float64 with real gloo processes. The one thing that Megatron-Core would force to float32 here, the factor 1/tokens, is
formed in float64 by ``training.optimizer.finalize_gradients``, so one bound holds for everything.
"""

from __future__ import annotations

import itertools

import pytest
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_vila.config.schema import MemoryConfig, ParallelConfig
from megatron_vila.plan.frames import deal_frames
from megatron_vila.plan.row import pack
from megatron_vila.training.step import Pass
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

TOLERANCE = 1e-8

DOCUMENTS = {
    "video": samples.document("video", "tt" + "Ft" * 7 + "ttttt", slice(-4, None)),
    "short": samples.document("short", "tttttttt"),
    "frames_first": samples.document("frames-first", "FFF" + "t" * 30, slice(-20, None)),
    "one_label": samples.document("one-label", "t" * 40 + "FFFF" + "tt", slice(2, 3)),
    "text_only": samples.document("text-only", "t" * 45),
    "image_only": samples.document("image-only", "F" * 9 + "t", slice(-2, None)),
    "one_token": samples.document("one-token", "t"),
    "no_labels": samples.document("no-labels", "tFt", slice(0, 0)),
    "last_frame": samples.document("last-frame", "t" * 9 + "F" + "ttt", slice(-3, None)),
}
MIXED_ROWS = [
    [DOCUMENTS["video"], DOCUMENTS["short"], DOCUMENTS["frames_first"]],
    [DOCUMENTS["one_label"]],
    [DOCUMENTS["text_only"], DOCUMENTS["one_token"]],
    [DOCUMENTS["image_only"]],
    [DOCUMENTS["no_labels"], DOCUMENTS["last_frame"]],
    [DOCUMENTS["short"]],
    [DOCUMENTS["one_token"], DOCUMENTS["video"]],
    [DOCUMENTS["frames_first"], DOCUMENTS["no_labels"]],
]


def layouts(world: int) -> list[ParallelConfig]:
    """Every (tp, pp, dp, ulysses, ring) with this product; dp is what the others leave."""
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    return [
        ParallelConfig(tp=tp, pp=pp, ulysses=u, ring=r)
        for tp, pp, u, r in itertools.product(sizes, repeat=4)
        if world % (tp * pp * u * r) == 0
    ]


def name(parallel: ParallelConfig) -> str:
    return f"tp{parallel.tp}-pp{parallel.pp}-u{parallel.ulysses}-r{parallel.ring}"


class Truths:
    """Truths by case, computed once."""

    def __init__(self, folder) -> None:
        self._folder, self._known = folder, {}

    def check(self, case: str, config, rows, world: int, parallel: ParallelConfig) -> None:
        if case not in self._known:
            self._known[case] = self._folder / f"{case}.pt"
            pool.run(1, contract.write_truth, config, rows, self._known[case])
        for rank, errors in enumerate(pool.run(world, contract.compare, config, rows, parallel, self._known[case])):
            wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE}
            assert not wrong, f"rank {rank} of {name(parallel)} differs from the truth: {wrong}"
            assert "loss" in errors


@pytest.fixture(scope="module")
def truths(tmp_path_factory) -> Truths:
    return Truths(tmp_path_factory.mktemp("truth"))


CASES = [pytest.param(world, p, id=f"world{world}-{name(p)}") for world in (1, 2, 4, 8) for p in layouts(world)]


def test_there_are_as_many_layouts_as_ordered_factorings():
    assert [len(layouts(world)) for world in (1, 2, 4, 8)] == [1, 5, 15, 35]


@pytest.mark.parametrize("world, parallel", CASES)
def test_loss_and_every_gradient_equal_the_truth_in_every_layout(truths, world, parallel):
    """Uneven documents and frames, ranks without frames, text-only and image-only rows, labels all on one rank, GQA with fewer
    key/value heads than ulysses or tp."""
    layers = 8 if parallel.pp > 2 else 4  # two of a stage, but one where there are eight stages
    truths.check(f"mixed-{layers}", samples.config(layers=layers), MIXED_ROWS, world, parallel)


@pytest.mark.parametrize("parallel", layouts(4), ids=name)
def test_the_contract_holds_for_tied_embeddings_without_bias(truths, parallel):
    truths.check("tied", samples.config(tied=True, bias=False, layers=4), MIXED_ROWS[:4], 4, parallel)


@pytest.mark.parametrize("parallel", [p for p in layouts(4) if p.ulysses > 1], ids=name)
def test_the_contract_holds_for_28_query_heads(truths, parallel):
    truths.check("28-heads", samples.config(heads=28, kv_heads=4, layers=4), MIXED_ROWS[:4], 4, parallel)


def test_the_contract_holds_for_seven_ulysses_ranks_that_cut_key_value_groups_unevenly(truths):
    truths.check(
        "28-heads", samples.config(heads=28, kv_heads=4, layers=4), MIXED_ROWS[:4], 7, ParallelConfig(ulysses=7)
    )


@pytest.mark.parametrize("parallel", [ParallelConfig(ulysses=2, ring=2), ParallelConfig(ulysses=4)], ids=name)
def test_the_contract_holds_where_ulysses_cuts_inside_key_value_groups(truths, parallel):
    truths.check("12-heads", samples.config(heads=12, kv_heads=3, layers=4), MIXED_ROWS[:3], 4, parallel)


SPREAD = [
    ParallelConfig(**sizes)
    for sizes in ({"tp": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}, {"pp": 2, "ring": 2}, {"tp": 2, "pp": 2})
]


UNITS = [
    [samples.document("units", "ttTtFVt" * 2 + "t" * 9, slice(-8, None)), samples.document("tiles", "tTt")],
    [samples.document("one-unit", "t" * 30 + "V" + "tt", slice(2, None))],
    [samples.document("uneven", "FFFTTVF" + "t" * 20, slice(-15, None)), DOCUMENTS["text_only"]],
    [DOCUMENTS["short"]],
]
"""Units of 1, 2 and 3 squares with 4, 8 and 12 tokens."""


@pytest.mark.parametrize("parallel", [*SPREAD, ParallelConfig()], ids=name)
def test_the_contract_holds_for_units_of_several_frames_and_tiles(truths, parallel):
    truths.check("units", samples.config(layers=4), UNITS, 4, parallel)


MEMORY_POLICIES = {
    "full": {"recompute": "full"},
    "kept attention": {"recompute": "attention_output"},
    "blocks of 2": {"recompute": "attention_output", "block_layers": 2},
    "tiles": {"mlp_tile": 5},
    "blocks of 3, tiles, all on the host": {
        "recompute": "attention_output", "block_layers": 3, "mlp_tile": 5, "offload_gib": 1.0
    },
    "part on the host": {"recompute": "attention_output", "offload_gib": 1e-5},
    "one layer of a stage": {"recompute": "attention_output", "recompute_layers": 1, "mlp_tile": 5},
}  # fmt: skip


@pytest.mark.parametrize("policy", MEMORY_POLICIES)
@pytest.mark.parametrize("parallel", SPREAD, ids=name)
def test_the_contract_holds_under_every_memory_policy(truths, parallel, policy):
    config = samples.config(layers=4)
    config.memory = MemoryConfig(**MEMORY_POLICIES[policy])
    config.model.vision.recompute = True
    truths.check("recomputed", config, MIXED_ROWS[:4], 4, parallel)


@pytest.mark.parametrize("recompute", ["none", "attention_output"])
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(ulysses=2, ulysses_chunks=2), ParallelConfig(ulysses=2, ring=2, ulysses_chunks=4)],
    ids=["u2 in 2 chunks", "u2-r2 in 4 chunks"],
)
def test_the_contract_holds_when_heads_travel_in_chunks(truths, parallel, recompute):
    config = samples.config(heads=16, kv_heads=8, layers=2)
    truths.check("chunks", config, MIXED_ROWS[:4], 1, ParallelConfig())
    config.memory.recompute, config.parallel = recompute, parallel
    truths.check("chunks", config, MIXED_ROWS[:4], parallel.ulysses * parallel.ring, parallel)


@pytest.mark.parametrize("recompute", ["none", "attention_output"])
@pytest.mark.parametrize(
    "trained", [("projector",), ("vision", "projector"), ("projector", "llm"), ("llm",)], ids="+".join
)
@pytest.mark.parametrize("parallel", SPREAD[:3], ids=name)
def test_the_contract_holds_for_the_parts_that_a_stage_trains(truths, parallel, trained, recompute):
    """Ranks and rows without frames included: with a frozen LLM nothing below their tokens learns, yet collectives must meet."""
    config = samples.config(layers=4)
    config.memory.recompute = recompute
    for part in ("vision", "projector", "llm"):
        getattr(config.optim, part).trainable = part in trained
    truths.check(f"{'-'.join(trained)}-{recompute}", config, MIXED_ROWS[:4], 4, parallel)


def frames_ahead(rank: int, config, rows, parallel: ParallelConfig) -> list[bool] | None:
    """Whether the frames of each micro-batch after the first were encoded under the one before; None without a tower."""
    topology, model, _ = contract.build(config, parallel)
    batches, started = [contract.loaded(row, topology) for row in rows], []
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    forward = Pass(ddp, topology, config.model.llm)
    if model.pre_process:
        start = forward._frames.start
        forward._frames.start = lambda pixels: (started.append(pixels), start(pixels))
    forward.run(batches, forward_only=True)
    topology.destroy()
    return [len(started) == len(batches) - 1 and started[i] is b.pixels for i, b in enumerate(batches[1:])] if started else None


def test_a_step_encodes_the_next_frames_under_the_layers_of_each_micro_batch_but_the_last():
    stages = pool.run(2, frames_ahead, samples.config(layers=4), MIXED_ROWS[:4], ParallelConfig(pp=2))
    assert stages == [[True] * 3, None]
    assert pool.run(1, frames_ahead, samples.config(layers=4), MIXED_ROWS[:1], ParallelConfig()) == [None]


@pytest.mark.parametrize("row", ["text_only", "image_only", "one_label", "no_labels"])
@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2, ulysses=2), ParallelConfig(ulysses=2, ring=2)], ids=name)
def test_the_contract_holds_for_a_step_of_one_special_row(truths, row, parallel):
    truths.check(f"only-{row}", samples.config(layers=4), [[DOCUMENTS[row]]], 4, parallel)


def test_the_rows_leave_some_ranks_without_frames():
    idle = [row for row in MIXED_ROWS if 0 < len(pack(row).frames) < 8]
    assert any(0 in list(map(int, (b[1:] - b[:-1]))) for b in (deal_frames([4] * len(pack(r).frames), 8) for r in idle))

"""The optimizer on real gloo ranks: rates per part, the schedule, the step against torch's AdamW, and the guard."""

import math

import pytest
import torch

from megatron_vila.training.optimizer import apply_step, learning_rates, part_of
from tests.ranks import pool
from tests.training.small_run import build, same

LAYOUTS = [
    (1, (1, 1, 1, 1)),
    (2, (1, 1, 1, 1)),
    (2, (2, 1, 1, 1)),
    (2, (1, 2, 1, 1)),
    (2, (1, 1, 2, 1)),
    (4, (2, 1, 1, 2)),
]


def test_the_part_follows_from_the_name():
    assert part_of("vision.vision_model.encoder.layers.0.mlp.fc1.weight") == "vision"
    assert part_of("module.projector.layers.0.bias") == "projector"
    assert part_of("module.module.llm.decoder.layers.0.mlp.linear_fc1.weight") == "llm"
    assert part_of("llm.vision.weight") == "llm"


def groups_of_a_run(rank, layout):
    run = build(layout, optim__projector__lr=5e-4, optim__min_lr=2e-4)
    names = {id(p): name for name, p in run.model.named_parameters()}
    seen = {}
    for parameter in run.optimizer.model_param_gbuf_map:
        group, _ = run.optimizer.model_param_group_index_map[parameter]
        group = run.optimizer.param_groups[group]
        seen[names[id(parameter)]] = (group["max_lr"], group["min_lr"], group["wd_mult"], parameter.dim())
    run.scheduler.step(5)
    return seen, learning_rates(run.optimizer, run.config.optim)


@pytest.mark.parametrize("world_size,layout", [(1, (1, 1, 1, 1)), (2, (1, 2, 1, 1)), (2, (1, 1, 1, 2))])
def test_each_part_has_its_rate_and_norms_and_biases_have_no_weight_decay(world_size, layout):
    peaks = {"vision": 1e-4, "projector": 5e-4, "llm": 1e-3}
    results = pool.run(world_size, groups_of_a_run, layout)
    seen = {name: values for part, _ in results for name, values in part.items()}
    assert {part_of(name) for name in seen} == set(peaks)
    for name, (max_lr, min_lr, wd_mult, dims) in seen.items():
        assert max_lr == peaks[part_of(name)]
        assert min_lr == min(2e-4, max_lr)
        assert wd_mult == (0.0 if dims == 1 or name.endswith(".bias") else 1.0)
    rates = [rates for _, rates in results]
    assert all(rate == rates[0] for rate in rates)
    assert rates[0]["vision"] == pytest.approx(1e-4) and 2e-4 < rates[0]["llm"] < 1e-3


def rates_of_a_schedule(rank, schedule, warmup_steps, fraction):
    run = build(
        (1, 1, 1, 1), optim__schedule=schedule, optim__warmup_steps=warmup_steps, optim__warmup_fraction=fraction,
        optim__min_lr=1e-4, optim__vision__lr=None,
    )  # fmt: skip
    rates = []
    for _ in range(21):
        rates.append(learning_rates(run.optimizer, run.config.optim))
        run.scheduler.step(1)
    assert all(rate["vision"] == rate["llm"] for rate in rates)
    return [rate["llm"] for rate in rates]


@pytest.mark.parametrize("warmup_steps,fraction", [(4, 0.5), (0, 0.2)])
def test_cosine_rises_linearly_then_falls_to_the_smallest_rate(warmup_steps, fraction):
    (rates,) = pool.run(1, rates_of_a_schedule, "cosine", warmup_steps, fraction)
    assert rates[:5] == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[12] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[20] == pytest.approx(1e-4)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_stays_at_the_peak_after_the_warm_up():
    (rates,) = pool.run(1, rates_of_a_schedule, "constant", 0, 0.1)
    assert rates[:3] == pytest.approx([0, 0.5e-3, 1e-3])
    assert rates[2:] == pytest.approx([1e-3] * 19)


def steps_and_reference(rank, layout, dtype, tied):
    """Largest difference to torch's AdamW on this rank's whole parameters, and the gradient norms."""
    run = build(layout, dtype, tied=tied)
    reference = {name: p.detach().clone().requires_grad_() for name, p in run.trainable().items()}
    groups = [
        {"params": [p], "name": name, "weight_decay": 0.0 if p.dim() == 1 or name.endswith(".bias") else 0.1}
        for name, p in reference.items()
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    norms, worst = [], 0.0
    for step in range(4):
        rates = learning_rates(run.optimizer, run.config.optim)
        gradients = {name: torch.sin(p.detach() * 100 + step) for name, p in reference.items()}
        norm = run.step(step)
        for group in adam.param_groups:
            group["lr"] = rates[part_of(group["name"])]
            group["params"][0].grad = gradients[group["name"]] * min(1.0, 1.0 / (norm + 1e-6))
        adam.step()
        norms.append(norm)
        worst = max(worst, *((p - reference[name]).abs().max().item() for name, p in run.trainable().items()))
    return worst, norms


@pytest.mark.parametrize("tied", [False, True], ids=["own_output", "tied_output"])
def test_every_layout_takes_the_step_of_plain_adamw_in_float64(tied):
    truth = None
    for world_size, layout in LAYOUTS:
        results = pool.run(world_size, steps_and_reference, layout, torch.float64, tied)
        assert max(worst for worst, _ in results) < 1e-14, layout
        norms = [norms for _, norms in results]
        assert all(norm == norms[0] for norm in norms)
        truth = truth or norms[0]
        assert norms[0] == pytest.approx(truth, rel=1e-12), layout


def dtypes_of_a_run(rank, dtype, in_fp32):
    run = build((1, 1, 1, 1), dtype, optim__grad_reduce_fp32=in_fp32)
    run.step(0)
    run.step(1)
    inner = run.optimizer.optimizer
    parameter = inner.param_groups[0]["params"][0]
    return run.ddp.buffers[0].grad_dtype, parameter.dtype, inner.state[parameter]["exp_avg"].dtype


@pytest.mark.parametrize(
    "dtype,in_fp32,expected",
    [
        (torch.float64, True, (torch.float64,) * 3),
        (torch.float32, True, (torch.float32,) * 3),
        (torch.bfloat16, True, (torch.float32,) * 3),
        (torch.bfloat16, False, (torch.bfloat16, torch.float32, torch.float32)),
    ],
)
def test_buffers_and_state_have_the_right_precision(dtype, in_fp32, expected):
    assert pool.run(1, dtypes_of_a_run, dtype, in_fp32) == [expected]


def broken_step(rank, layout, dtype, bad_rank, how, offload_fraction=0.0):
    run = build(layout, dtype, optim__offload_fraction=offload_fraction)
    for step in range(2):
        run.step(step)
    before = run.state()
    run.ddp.zero_grad_buffer()
    for parameter in run.trainable().values():
        parameter.main_grad.fill_(0.25)
    if rank == bad_rank and how != "loss":
        list(run.trainable().values())[-1].main_grad.view(-1)[-1] = float(how)
    run.finalize(tokens=3)
    updated, norm = apply_step(run.optimizer, loss_is_finite=not (how == "loss" and rank == bad_rank))
    untouched = same(before, run.state())
    recovered = math.isfinite(run.step(2)) and not same(before["weights"], run.state()["weights"])
    return updated, math.isfinite(norm), untouched, recovered


@pytest.mark.parametrize("how", ["nan", "inf", "loss"])
@pytest.mark.parametrize(
    "world_size,layout", [(1, (1, 1, 1, 1)), (2, (1, 2, 1, 1)), (2, (2, 1, 1, 1)), (2, (1, 1, 1, 1))]
)
def test_one_value_that_is_not_finite_on_one_rank_changes_nothing_on_any(world_size, layout, how):
    results = pool.run(world_size, broken_step, layout, torch.float32, world_size - 1, how)
    assert results == [(False, False, True, True)] * world_size


def test_a_gradient_that_is_not_finite_in_bfloat16_changes_nothing():
    assert pool.run(2, broken_step, (1, 1, 2, 1), torch.bfloat16, 1, "inf") == [(False, False, True, True)] * 2


def steps_with_overlap(rank, layout, overlap):
    run = build(layout, overlap=overlap)
    assert run.ddp.ddp_config.overlap_grad_reduce is overlap
    norms = [run.step(step) for step in range(3)]
    return norms, run.state()["weights"]


@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1)])
def test_reducing_gradients_during_the_backward_pass_changes_no_bit(layout):
    after, during = (pool.run(2, steps_with_overlap, layout, overlap) for overlap in (False, True))
    assert same([list(result) for result in after], [list(result) for result in during])


def normalized_gradients(rank, dtype):
    run = build((1, 1, 1, 1), dtype)
    run.ddp.zero_grad_buffer()
    for parameter in run.trainable().values():
        parameter.main_grad.fill_(0.1 * (rank + 1))
    run.finalize(tokens=[5, 2][rank])
    run.optimizer.prepare_grads()
    return [p.grad.min().item() for p in run.optimizer.get_parameters()] + [
        p.grad.max().item() for p in run.optimizer.get_parameters()
    ]


def test_gradients_are_divided_by_the_tokens_of_all_ranks_exactly_in_float64():
    for values in pool.run(2, normalized_gradients, torch.float64):
        assert values == pytest.approx([(0.1 + 0.2) / 7] * len(values), rel=1e-15)


def step_without_tokens(rank):
    run = build((1, 1, 1, 1))
    run.ddp.zero_grad_buffer()
    run.finalize(tokens=0)
    return apply_step(run.optimizer)


def test_a_step_without_any_supervised_token_has_zero_gradients_and_no_nan():
    assert pool.run(2, step_without_tokens) == [(True, 0.0)] * 2


def frozen_run(rank, layout, frozen, offload_fraction=0.0):
    trainable = {f"optim__{part}__trainable": False for part in frozen}
    run = build(layout, optim__offload_fraction=offload_fraction, **trainable)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(2):
        run.step(step)
    after = dict(run.model.named_parameters())
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("frozen", [("vision",), ("llm",), ("projector", "llm"), ("vision", "projector")])
def test_frozen_parts_stay_and_a_stage_with_nothing_to_train_takes_part(frozen):
    moved = set().union(*pool.run(2, frozen_run, (1, 2, 1, 1), frozen))
    assert moved == {"vision", "projector", "llm"} - set(frozen)

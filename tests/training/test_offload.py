"""Optimizer state in host memory on real gloo ranks: the step, the guard and checkpoints against state on the device.

On a CPU device and host are the same memory: what these tests cannot show is where tensors lie on a GPU, and copies that overlap.
"""

import pytest
import torch

from megatron_vila.training import offload
from megatron_vila.training.memory_report import _optimizer_bytes
from tests.checkpoint.test_checkpoint import content, load_and_go_on, save_and_go_on
from tests.ranks import pool
from tests.training.small_run import build, same
from tests.training.test_optimizer import broken_step, frozen_run

ONE, DP2, TP2 = (1, (1, 1, 1, 1)), (2, (1, 1, 1, 1)), (2, (2, 1, 1, 1))
ULYSSES2, RING2, PP2 = (2, (1, 1, 2, 1)), (2, (1, 1, 1, 2)), (2, (1, 2, 1, 1))
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 0.0}
"""How far weights of four steps with another Adam kernel may be; 16 bits hide what float32 main weights differ by."""


def four_steps(rank, layout, dtype, fraction, in_fp32=True, chunk=offload.CHUNK_ELEMENTS):
    offload.CHUNK_ELEMENTS = chunk
    run = build(layout, dtype, optim__offload_fraction=fraction, optim__grad_reduce_fp32=in_fp32)
    norms = [run.step(step) for step in range(4)]
    return norms, {name: p.detach().clone() for name, p in run.trainable().items()}, _optimizer_bytes(run.optimizer)


def apart(a, b):
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size,layout", [ONE, DP2, ULYSSES2, RING2, TP2], ids=str)
def test_steps_with_state_on_the_host_are_those_with_state_on_the_device(world_size, layout, dtype):
    plain, half, whole = (pool.run(world_size, four_steps, layout, dtype, fraction) for fraction in (0.0, 0.5, 1.0))
    assert plain[0][0][0] > 1.0, "nothing is clipped"
    for (norms, weights, _), *offloaded in zip(plain, half, whole, strict=True):
        for other_norms, other_weights, _ in offloaded:
            assert other_norms == pytest.approx(norms, rel=1e-6)
            assert apart(weights, other_weights) <= ROUNDING[dtype]
    assert all(same(a[1], b[1]) for a, b in zip(half, whole, strict=True))


@pytest.mark.parametrize("chunk", [1000, 4096])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_chunks_that_cut_parameters_anywhere_change_nothing(chunk, fraction):
    whole = pool.run(2, four_steps, DP2[1], torch.float64, fraction)
    cut = pool.run(2, four_steps, DP2[1], torch.float64, fraction, True, chunk)
    for (norms, weights, held), (cut_norms, cut_weights, cut_held) in zip(whole, cut, strict=True):
        assert norms == cut_norms and held == cut_held and apart(weights, cut_weights) <= 1e-15


def test_16_bit_gradients_are_clipped_in_float32():
    plain, half, whole = (pool.run(2, four_steps, DP2[1], torch.bfloat16, f, False) for f in (0.0, 0.5, 1.0))
    assert plain[0][0][0] > 1.0, "nothing is clipped"
    assert same(plain[0][1], half[0][1]) and same(plain[0][1], whole[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_share_leaves_the_device_for_the_host(dtype):
    ((_, _, (plain, none)),) = pool.run(1, four_steps, ONE[1], dtype, 0.0)
    ((_, weights, (half, half_on_host)),) = pool.run(1, four_steps, ONE[1], dtype, 0.5)
    ((_, _, (nothing, on_host)),) = pool.run(1, four_steps, ONE[1], dtype, 1.0)
    parameters = sum(weight.numel() for weight in weights.values())
    per_parameter = {torch.float32: 8, torch.bfloat16: 12}[dtype]
    # Without offload a step count of 4 bytes stands beside the state of each parameter.
    assert plain == pytest.approx(per_parameter * parameters, rel=0.01) and none == 0
    assert nothing == 0 and on_host == per_parameter * parameters
    assert half <= 0.5 * plain and half_on_host >= 0.5 * on_host
    assert half + half_on_host == on_host


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("world_size,layout,dtype", [(*DP2, torch.float32), (*ULYSSES2, torch.bfloat16)])
def test_a_step_that_is_not_finite_changes_nothing_on_host_and_device(world_size, layout, dtype, fraction):
    for how in ("nan", "loss"):
        results = pool.run(world_size, broken_step, layout, dtype, world_size - 1, how, fraction)
        assert results == [(False, False, True, True)] * world_size


@pytest.mark.parametrize("frozen", [("vision", "projector"), ("projector", "llm")])
def test_a_stage_with_nothing_to_train_takes_part(frozen):
    moved = set().union(*pool.run(2, frozen_run, PP2[1], frozen, 1.0))
    assert moved == {"vision", "projector", "llm"} - set(frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "saved_with,before,loaded_with,after",
    [
        (DP2, 1.0, DP2, 0.0),
        (DP2, 0.0, DP2, 1.0),
        (RING2, 0.5, RING2, 0.5),
        (DP2, 1.0, DP2, 1.0),
        (TP2, 1.0, ULYSSES2, 0.5),
        (ONE, 0.0, RING2, 1.0),
        (ULYSSES2, 0.5, ONE, 0.0),
    ],
)
def test_a_checkpoint_resumes_exactly_with_any_other_share_and_layout(
    tmp_path, saved_with, before, loaded_with, after, dtype
):
    options, folder = {"dtype": dtype, "optim__offload_fraction": before}, str(tmp_path)
    truth = pool.run(saved_with[0], save_and_go_on, saved_with[1], folder, 3, options)
    options["optim__offload_fraction"] = after
    results = pool.run(loaded_with[0], load_and_go_on, loaded_with[1], folder, 3, options)
    (saved,), (again,) = pool.run(1, content, folder), pool.run(1, content, str(tmp_path / "again"))
    assert same(saved, again), "what was loaded is not what was saved"
    assert results[0][0] == pytest.approx(truth[0][0], rel=1e-5)
    if saved_with == loaded_with:
        for (_, went_on), (_, resumed) in zip(truth, results, strict=True):
            assert apart(went_on["weights"], resumed["weights"]) <= ROUNDING[dtype]
            assert before != after or same(went_on, resumed), "going on is not bitwise equal"

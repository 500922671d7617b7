"""Products with SwiGLU inside against products and SwiGLU apart: the order they keep gate and up in does not show."""

import importlib.util
import sys

import pytest
import torch

from megatron_vila.config.schema import MemoryConfig, ParallelConfig
from megatron_vila.models.decoder import gated, mlp
from megatron_vila.models.decoder.gated import APART, Apart, products_for, reason_for_apart
from megatron_vila.models.decoder.weight_gradient import WeightGradient
from tests import samples
from tests.gpu import only_on_gpus
from tests.parallel import contract
from tests.parallel.test_gradient_contract import MIXED_ROWS, TOLERANCE
from tests.ranks import pool


def alternating(x, dim):
    """All gates before all ups, to gate 0, up 0, gate 1, up 1, ..."""
    return torch.stack(x.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def halves(x, dim):
    return torch.cat([x.unflatten(dim, (-1, 2)).select(dim + 1, half) for half in (0, 1)], dim)


class Alternating(Apart):
    """What QuACK's products do, by PyTorch's."""

    runs = 0

    def gate_up(self, hidden_TH, fc1_2FH):
        type(self).runs += 1
        return alternating(super().gate_up(hidden_TH, fc1_2FH), 1)

    def forward(self, hidden_TH, fc1_2FH):
        gate_up_T2F = self.gate_up(hidden_TH, fc1_2FH)
        gate, up = halves(gate_up_T2F, 1).chunk(2, 1)
        return gate_up_T2F, torch.nn.functional.silu(gate) * up

    def backward(self, grad_TH, fc2_HF, gate_up_T2F):
        inner_TF, dgate_up_T2F = super().backward(grad_TH, fc2_HF, halves(gate_up_T2F, 1))
        return inner_TF, alternating(dgate_up_T2F, 1)

    def input_gradient(self, dgate_up_T2F, fc1_2FH, out):
        super().input_gradient(dgate_up_T2F, alternating(fc1_2FH, 0), out)

    def add_weight_gradient(self, dgate_up_T2F, hidden_TH, total):
        def multiply(a, b, out, add):
            product = halves(a @ b, 0)
            out.copy_(out + product if add else product)

        total.add(dgate_up_T2F, hidden_TH, multiply)


def compare(rank, *case):
    """As ``contract.compare``, gate and up side by side; and how often the MLPs ran."""
    usual, mlp.products_for, Alternating.runs = mlp.products_for, lambda *tensors: Alternating(), 0
    errors = contract.compare(rank, *case)
    mlp.products_for = usual
    return errors, Alternating.runs


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "memory",
    [MemoryConfig(), MemoryConfig(recompute="attention_output"), MemoryConfig(mlp_tile=4)],
    ids=["kept", "again", "tiles"],
)
def test_no_gradient_depends_on_the_order_of_gate_and_up(tmp_path, memory, tp):
    config = samples.config(layers=2)
    pool.run(1, contract.write_truth, config, MIXED_ROWS[:2], tmp_path / "truth.pt")
    config.memory = memory
    for errors, runs in pool.run(tp, compare, config, MIXED_ROWS[:2], ParallelConfig(tp=tp), tmp_path / "truth.pt"):
        assert runs > 0 and max(errors.values()) < TOLERANCE


def test_a_cpu_multiplies_and_forms_swiglu_apart():
    assert products_for(torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(8, 8)) is APART
    assert "Hopper" in reason_for_apart(torch.device("cpu"))


class NotCompiled:
    def try_once(self, device):
        raise TypeError("no key")


def test_a_hopper_gpu_where_quack_is_missing_or_does_not_work_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "quack", None)
    gated._inside.cache_clear()
    try:
        assert "pip install quack-kernels" in reason_for_apart(torch.device("cuda", 7))
        monkeypatch.setattr(gated, "Inside", lambda: {}["gemm"])
        assert "does not work here (KeyError" in reason_for_apart(torch.device("cuda", 6))
        monkeypatch.setattr(gated, "Inside", NotCompiled)
        assert "does not work here (TypeError: no key)" in reason_for_apart(torch.device("cuda", 5))
    finally:
        gated._inside.cache_clear()


is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = only_on_gpus("" if is_hopper and importlib.util.find_spec("quack") else "needs a Hopper GPU and quack-kernels")


def operands(tokens, hidden, width):
    generator = torch.Generator("cuda").manual_seed(tokens)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).bfloat16()

    weights = random(2 * width, hidden, scale=hidden**-0.5), random(hidden, width, scale=width**-0.5)
    return random(tokens, hidden), random(tokens, hidden), *weights


def everything(products, x, dout, fc1, fc2, tiles, sums):
    """All that an MLP gets from ``products``, in Megatron's order; the weight's gradient added to ones, and alone."""
    gate_up, inner = products.forward(x, fc1)
    again, dgate_up = products.backward(dout, fc2, products.gate_up(x, fc1))
    dx = torch.empty_like(x)
    products.input_gradient(dgate_up, fc1, out=dx)
    fc1.main_grad = summed = torch.ones_like(fc1, dtype=sums)
    total = WeightGradient(fc1, tiles)
    for rows, part in zip(dgate_up.chunk(tiles), x.chunk(tiles), strict=True):
        products.add_weight_gradient(rows, part, total)
    total.result()
    del fc1.main_grad
    alone = WeightGradient(fc1, 1)
    products.add_weight_gradient(dgate_up, x, alone)
    if products is not APART:
        gate_up, dgate_up = halves(gate_up, 1), halves(dgate_up, 1)
    found = {"gate_up": gate_up, "inner": inner, "inner again": again, "dgate_up": dgate_up}
    return found | {"dx": dx, "sum": summed, "dfc1": alone.result()}


def exact(x, dout, fc1, fc2):
    x, dout, fc1, fc2 = (t.double() for t in (x, dout, fc1, fc2))
    gate_up = (x @ fc1.t()).requires_grad_()
    gate, up = gate_up.chunk(2, 1)
    inner = torch.nn.functional.silu(gate) * up
    (dgate_up,) = torch.autograd.grad(inner, gate_up, dout @ fc2)
    found = {"gate_up": gate_up, "inner": inner, "inner again": inner, "dgate_up": dgate_up}
    return found | {"dx": dgate_up @ fc1, "sum": dgate_up.t() @ x + 1, "dfc1": dgate_up.t() @ x}


@hopper
@pytest.mark.parametrize("sums", [torch.bfloat16, torch.float32], ids=["bfloat16 sums", "float32 sums"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "tiles"), [(5, 64, 88, 1), (1003, 256, 344, 3), (4096, 1536, 8960, 1), (3000, 4096, 14336, 2)]
)
def test_products_with_swiglu_inside_err_no_more_than_those_apart(tokens, hidden, width, tiles, sums):
    x, dout, fc1, fc2 = operands(tokens, hidden, width)
    inside = products_for(x, fc1, fc2)
    assert inside is not APART
    truth = exact(x, dout, fc1, fc2)
    errors = [
        {name: ((found.double() - truth[name]).norm() / truth[name].norm()).item() for name, found in values.items()}
        for values in (everything(products, x, dout, fc1, fc2, tiles, sums) for products in (inside, APART))
    ]
    assert all(errors[0][name] <= 1.05 * errors[1][name] for name in truth), errors


@hopper
def test_products_with_swiglu_inside_repeat_bit_by_bit():
    x, dout, fc1, fc2 = operands(2000, 1024, 2816)
    inside = products_for(x, fc1, fc2)
    assert inside is not APART
    first, *others = (everything(inside, x, dout, fc1, fc2, 1, torch.bfloat16) for _ in range(5))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@hopper
def test_rows_that_are_no_whole_vectors_are_multiplied_apart():
    x, _, fc1, fc2 = operands(16, 64, 36)
    assert products_for(x, fc1, fc2) is APART
    x, _, fc1, fc2 = operands(16, 64, 40)
    assert products_for(x.float(), fc1, fc2) is APART and products_for(x, fc1, fc2) is not APART
    whole = torch.zeros(fc1.numel() + 1, device="cuda", dtype=torch.bfloat16)
    fc1.main_grad = whole[1:].view_as(fc1)
    assert products_for(x, fc1, fc2) is APART

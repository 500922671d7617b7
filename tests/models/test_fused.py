"""The fused operations of a layer against plain autograd."""

import shutil

import pytest
import torch

from megatron_vila import accelerator
from megatron_vila.models.decoder.fused import rms_norm, swiglu, swiglu_backward_
from megatron_vila.parallel.rope import rotary_angles, rotary_qkv

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


def plain_norm(x, weight, eps=1e-3):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def plain_rotary(qkv, cos, sin):
    """As ``joined(rotary_qkv)``: heads turned, the last of each group left."""
    first, second = qkv[:, :, :-1].chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = qkv[:, :, :-1] * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, qkv[:, :, -1:]], dim=2)


def joined(q, k, v):
    """Apart and joined again: an error in where a head comes from or goes to shows."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    return torch.cat([q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)], dim=2)


def plus_twice(stream, norm):
    return stream + 2 * norm


def angles(tokens, dim, dtype=torch.float64):
    return rotary_angles(torch.arange(tokens) * 7, dim, 100.0, 2.0, dtype)


CASES = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-3)[1], plain_norm, [(5, 1, 8), (8,)]),
    "stream and norm": (
        lambda x, w: plus_twice(*rms_norm(x, w, 1e-3)),
        lambda x, w: x + 2 * plain_norm(x, w),
        [(5, 1, 8), (8,)],
    ),
    "norm of a sum": (
        lambda x, y, w: plus_twice(*rms_norm(x, w, 1e-3, y)),
        lambda x, y, w: x + y + 2 * plain_norm(x + y, w),
        [(5, 1, 8), (5, 1, 8), (8,)],
    ),
    "only the norm of a sum": (
        lambda x, y, w: rms_norm(x, w, 1e-3, y)[1],
        lambda x, y, w: plain_norm(x + y, w),
        [(5, 1, 8), (5, 1, 8), (8,)],
    ),
    "swiglu": (swiglu, plain_swiglu, [(5, 1, 12)]),
    "rotary": (
        lambda x: joined(*rotary_qkv(x, *angles(5, 6))),
        lambda x: plain_rotary(x, *angles(5, 6)),
        [(5, 3, 4, 6)],
    ),
}


WAYS = pytest.mark.parametrize("device", ["plain", pytest.param("cpu", marks=needs_compiler)], ids=["plain", "compiled"])


@WAYS
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_plain_autograd(case, device, monkeypatch):
    monkeypatch.setattr(accelerator, "_COMPILED_DEVICE", device)
    fused, plain, shapes = CASES[case]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    found, expected = fused(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for grads in zip(*(torch.autograd.grad(y, inputs, direction) for y in (found, expected)), strict=True):
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("stream and norm", "norm of a sum")])
def test_16_bit_values_are_rounded_once(case):
    fused, plain, shapes = CASES[case]
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    if case == "only the norm of a sum":
        inputs[1].zero_()  # the sum is a result of its own, rounded before its norm
    exact = plain(*(x.double() for x in inputs))
    error = (fused(*inputs).double() - exact).abs()
    assert (error <= 1.05 * torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6).all()


@WAYS
def test_the_value_of_swiglu_takes_the_place_of_its_gradient(monkeypatch, device):
    monkeypatch.setattr(accelerator, "_COMPILED_DEVICE", device)
    for tokens in (5, 3):
        gate_up, dout = (torch.randn(tokens, width, dtype=torch.float64) for width in (24, 12))
        gate_up.requires_grad_()
        value = plain_swiglu(gate_up)
        (expected,) = torch.autograd.grad(value, gate_up, dout)
        found = swiglu_backward_(gate_up.detach(), dout)
        torch.testing.assert_close((found, dout), (expected, value.detach()), rtol=1e-12, atol=1e-13)


def test_only_the_input_of_swiglu_and_the_angles_of_the_rotation_are_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        x = torch.randn(4, 1, 6, requires_grad=True)
        swiglu(x)
        rotary_qkv(torch.randn(4, 2, 3, 6, requires_grad=True), *angles(4, 6, torch.float32))
    assert [tuple(t.shape) for t in saved] == [(4, 1, 6), (4, 6), (4, 6)]


def test_a_frozen_weight_gets_no_gradient_and_the_input_does():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4)
    rms_norm(x, weight, 1e-6)[1].sum().backward()
    assert x.grad is not None and weight.grad is None

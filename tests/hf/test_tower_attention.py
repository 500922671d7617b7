"""Packed frames and windows of a vision tower: each part attends to itself alone, whatever the lengths."""

import pytest
import torch

from megatron_vila.hf.mm_sp import enable_mm_sp
from megatron_vila.hf.mm_sp.tower_attention import TOWER_ATTENTION, tower_attention
from tests.hf.mm_sp_cases import build
from tests.ranks import pool


@pytest.mark.parametrize(
    "lengths", [[5], [4, 4, 4], [6, 2, 6, 3, 2, 1], [3, 0, 5, 3, 0]], ids=["one", "equal", "mixed", "with empty"]
)
def test_each_part_attends_to_itself_alone(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    query, key, value, grad = (
        torch.randn(1, 3, sum(lengths), 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    for _ in range(2):  # the second time the bounds are known
        out, _weights = tower_attention(None, query, key, value, None, scaling=0.3, cu_seq_lens_q=bounds)
    wanted = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        wanted.append((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)
    truth = torch.cat(wanted, 2).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    weight = grad.detach().transpose(1, 2)
    for found, right in zip(
        torch.autograd.grad((out * weight).sum(), (query, key, value)),
        torch.autograd.grad((truth * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def _tower_settings(rank: int) -> list[tuple[str, str, str]]:
    found = []
    for name, asked in (("qwen2_5_vl", "sdpa"), ("qwen3_vl", "eager")):
        model = build(name)
        tower = model.model.visual.config
        tower._attn_implementation = asked
        mm_sp = enable_mm_sp(model)
        on = tower._attn_implementation
        mm_sp.disable()
        found.append((asked, on, tower._attn_implementation))
    return found


def test_a_tower_with_sdpa_takes_it_and_one_with_another_attention_keeps_its_own():
    (found,) = pool.run(1, _tower_settings)
    assert found == [("sdpa", TOWER_ATTENTION, "sdpa"), ("eager", "eager", "eager")]

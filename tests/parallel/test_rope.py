"""Rotary embedding against transformers' Llama and Qwen2, and against its own definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from megatron_vila.parallel.rope import rotary_angles, rotary_qkv

LLAMA, QWEN2 = "llama", "qwen2"
POSITIONS_S = torch.tensor([0, 1, 2, 5, 0, 1, 63, 64, 511])


def transformers_rotary(family: str, head_dim: int, theta: float, factor: float):
    config_class, module = {LLAMA: (LlamaConfig, modeling_llama), QWEN2: (Qwen2Config, modeling_qwen2)}[family]
    scaling = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    config = config_class(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=1024,
    )
    rotary = {LLAMA: "LlamaRotaryEmbedding", QWEN2: "Qwen2RotaryEmbedding"}[family]
    return getattr(module, rotary)(config), module.apply_rotary_pos_emb


def turned(x_SHD: torch.Tensor, cos_SD: torch.Tensor, sin_SD: torch.Tensor) -> torch.Tensor:
    """Heads as the queries, and as the keys, of as many groups."""
    q_SHD, k_SHD, v_SHD = rotary_qkv(x_SHD.unsqueeze(2).expand(-1, -1, 3, -1), cos_SD, sin_SD)
    assert torch.equal(q_SHD, k_SHD) and torch.equal(v_SHD, x_SHD)
    return q_SHD


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize(("family", "theta"), [(LLAMA, 500000.0), (QWEN2, 1000000.0)])
def test_angles_and_turned_heads_match_transformers(family, theta, factor):
    rotary, turn = transformers_rotary(family, 16, theta, factor)
    q_SHD = torch.randn(len(POSITIONS_S), 3, 16, generator=torch.Generator().manual_seed(1))
    expected_cos, expected_sin = rotary(q_SHD, POSITIONS_S[None])
    cos_SD, sin_SD = rotary_angles(POSITIONS_S, 16, theta, factor, torch.float32)
    torch.testing.assert_close(cos_SD, expected_cos[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(sin_SD, expected_sin[0], rtol=0, atol=5e-5)
    heads_first = q_SHD.transpose(0, 1)[None]
    expected, _ = turn(heads_first, heads_first, cos_SD[None], sin_SD[None])
    assert torch.equal(turned(q_SHD, cos_SD, sin_SD), expected[0].transpose(0, 1))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_each_pair_turns_by_position_over_factor_times_its_frequency(factor):
    cos_SD, sin_SD = rotary_angles(POSITIONS_S, 8, 10000.0, factor, torch.float64)
    for row, position in enumerate(POSITIONS_S.tolist()):
        for n in range(4):
            angle = position / factor * 10000.0 ** (-2 * n / 8)
            for column in (n, n + 4):
                assert math.isclose(cos_SD[row, column], math.cos(angle), abs_tol=1e-12)
                assert math.isclose(sin_SD[row, column], math.sin(angle), abs_tol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_score_depends_on_the_distance_of_query_and_key_only(query, key, shift):
    q_D, k_D = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(query_position: int, key_position: int) -> torch.Tensor:
        angles = rotary_angles(torch.tensor([query_position, key_position]), 8, 1e6, 1.0, torch.float64)
        heads = turned(torch.stack([q_D, k_D])[:, None], *angles)
        return (heads[0] * heads[1]).sum()

    torch.testing.assert_close(score(query, key), score(query + shift, key + shift), rtol=0, atol=1e-8)


def test_float32_angles_stay_exact_at_two_million_tokens():
    positions_S = torch.tensor([2_000_000, 1_999_999])
    exact = rotary_angles(positions_S, 128, 500000.0, 1.0, torch.float64)
    for rough, truth in zip(rotary_angles(positions_S, 128, 500000.0, 1.0, torch.bfloat16), exact, strict=True):
        assert rough.dtype == torch.float32
        assert torch.equal(rough, truth.float())


def test_the_gradient_is_the_turn_back():
    cos_SD, sin_SD = rotary_angles(POSITIONS_S, 8, 10000.0, 1.0, torch.float64)
    x_SHD = torch.randn(len(POSITIONS_S), 2, 8, dtype=torch.float64, requires_grad=True)
    y_SHD = turned(x_SHD, cos_SD, sin_SD)
    y_SHD.backward(y_SHD.detach())
    torch.testing.assert_close(x_SHD.grad, x_SHD.detach(), rtol=1e-14, atol=1e-14)


def test_bfloat16_heads_are_turned_in_float32_and_rounded_once():
    cos_SD, sin_SD = rotary_angles(POSITIONS_S, 16, 10000.0, 1.0, torch.bfloat16)
    x_SHD = torch.randn(len(POSITIONS_S), 2, 16).bfloat16()
    y_SHD = turned(x_SHD, cos_SD, sin_SD)
    assert y_SHD.dtype == torch.bfloat16
    assert torch.equal(y_SHD, turned(x_SHD.float(), cos_SD, sin_SD).bfloat16())


def test_positions_that_are_no_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="give token positions as int64"):
        rotary_angles(torch.arange(3.0), 8, 1e4, 1.0, torch.float32)

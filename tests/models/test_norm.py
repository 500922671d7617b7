"""RMSNorm against transformers' and against float64."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_vila.models.decoder.norm import RMSNorm


def config(**options) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2, normalization="RMSNorm", **options)


def pair(dtype: torch.dtype) -> tuple[RMSNorm, LlamaRMSNorm, torch.Tensor]:
    torch.manual_seed(2)
    norm, reference = RMSNorm(config=config(), hidden_size=64, eps=1e-6), LlamaRMSNorm(64, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(64))
        reference.weight.copy_(norm.weight)
    return norm.to(dtype), reference.to(dtype), (3 * torch.randn(5, 2, 64)).to(dtype)


def test_it_matches_llama_in_value_and_gradient():
    norm, reference, x = pair(torch.float32)
    results = []
    for module in (norm, reference):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad, module.weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32_and_rounded_like_llamas(dtype):
    norm, reference, x = pair(dtype)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    y = norm(x)
    assert y.dtype == dtype
    one_rounding = torch.finfo(dtype).eps / 2
    assert ((y.double() - exact).abs() <= 1.01 * one_rounding * exact.abs()).all()
    torch.testing.assert_close(y, reference(x), rtol=4 * one_rounding, atol=0)


def test_float64_is_computed_in_float64():
    norm, _, x = pair(torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(norm, x[:2].clone().requires_grad_())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_the_sum_over_tensor_parallel_ranks_under_sequence_parallelism(sequence_parallel):
    options = {"tensor_model_parallel_size": 2, "sequence_parallel": True} if sequence_parallel else {}
    norm = RMSNorm(config=config(**options), hidden_size=64, eps=1e-5)
    assert norm.weight.sequence_parallel is sequence_parallel
    assert list(norm.state_dict()) == ["weight"]


def test_settings_that_ask_for_another_norm_are_refused():
    layer_norm = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=2)
    for wrong in (layer_norm, config(layernorm_zero_centered_gamma=True)):
        with pytest.raises(ValueError, match="set normalization=RMSNorm and layernorm_zero_centered_gamma=False"):
            RMSNorm(config=wrong, hidden_size=64, eps=1e-5)

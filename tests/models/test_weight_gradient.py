"""A weight's gradient as a sum of products, with and without Megatron's buffer."""

import pytest
import torch

from megatron_vila.models.decoder.weight_gradient import WeightGradient


@pytest.mark.parametrize("main", [None, torch.bfloat16, torch.float32], ids=["alone", "bfloat16 buffer", "float32 buffer"])
@pytest.mark.parametrize("tiles", [1, 3])
def test_products_are_summed_and_rounded_once(main, tiles):
    generator = torch.Generator().manual_seed(tiles)
    dout, x = (torch.randn(30, width, generator=generator).bfloat16() for width in (5, 7))
    weight = torch.full((5, 7), torch.nan).bfloat16()
    exact = dout.double().t() @ x.double()
    if main is not None:
        weight.main_grad = torch.ones(5, 7, dtype=main)
        exact += 1
    total = WeightGradient(weight, tiles)
    for part, rows in zip(dout.chunk(tiles), x.chunk(tiles), strict=True):
        total.add(part, rows)
    result = total.result()
    if main is not None:
        assert result.shape == weight.shape and result.is_sparse and result._nnz() == 0
        result = weight.main_grad
    assert result.dtype == (main or torch.bfloat16)
    # Of 16 bits, the buffer of several tiles is rounded with what was there and once more with their sum.
    roundings = 2 if main is torch.bfloat16 and tiles > 1 else 1
    unit = torch.finfo(result.dtype).eps / 2 * roundings
    assert ((result.double() - exact).abs() <= unit * exact.abs() + 1e-5).all()

"""The fused head against plain float64 cross-entropy."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_vila.models import head
from megatron_vila.models.head import Vocabulary, fused_head
from tests.ranks import pool

HIDDEN, TRUE_VOCABULARY = 6, 21


def _case(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states and labels of all supervised tokens, and the true rows of the output layer."""
    generator = torch.Generator().manual_seed(sum(counts) + len(counts))
    hidden_NH = torch.randn(sum(counts), HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(TRUE_VOCABULARY, HIDDEN, dtype=torch.float64, generator=generator)
    labels_N = torch.randint(TRUE_VOCABULARY, (sum(counts),), generator=generator)
    # Some predictions are right.
    labels_N[::3] = (hidden_NH @ weight_VH.t()).argmax(1)[::3]
    return hidden_NH, weight_VH, labels_N


def _truth(counts: list[int]) -> tuple[torch.Tensor, ...]:
    """Loss, gradients for a loss counted three times, and which predictions are right."""
    hidden_NH, weight_VH, labels_N = _case(counts)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    logits_NV = hidden_NH @ weight_VH.t()
    loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    (3 * loss).backward()
    return loss.detach(), hidden_NH.grad, weight_VH.grad, logits_NV.argmax(1) == labels_N


def _run(rank: int, counts: list[int], rows_per_rank: int, chunk: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """This rank's part: ``counts[rank]`` tokens and ``rows_per_rank`` rows of the padded output layer."""
    head.CHUNK = chunk
    hidden_NH, weight_VH, labels_N = _case(counts)
    # Whoever reads a padding row gets a loss that is not finite.
    padded_VH = torch.full((rows_per_rank * len(counts), HIDDEN), torch.nan, dtype=torch.float64)
    padded_VH[:TRUE_VOCABULARY] = weight_VH
    first = rows_per_rank * rank
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    hidden_nH = hidden_NH[mine].to(dtype).requires_grad_()
    weight = padded_VH[first : first + rows_per_rank].to(dtype).requires_grad_()
    vocabulary = Vocabulary(first, max(0, min(rows_per_rank, TRUE_VOCABULARY - first)), dist.group.WORLD)
    output = fused_head(hidden_nH, weight, labels_N[mine], counts, vocabulary)
    (3 * output.loss_sum).backward()
    head.CHUNK = 4096
    return {
        "loss": output.loss_sum.detach(),
        "correct": output.correct_n,
        "dhidden": hidden_nH.grad,
        "dweight": weight.grad,
    }


CASES = [
    ([7], 21, 4096),
    ([7], 24, 3),
    ([0], 24, 3),
    ([5, 2], 11, 4),
    ([0, 6], 12, 4),
    ([0, 0], 12, 4),
    ([4, 1, 0, 9], 6, 8),
    ([3, 0, 0, 0], 6, 1),
    # The last rank holds nothing but padding.
    ([2, 3, 1, 4], 7, 4096),
    ([2, 3, 1, 4], 8, 4),
    ([0, 0, 0, 0], 8, 4),
]


@pytest.mark.parametrize(("counts", "rows_per_rank", "chunk"), CASES)
def test_loss_gradients_and_hits_equal_plain_cross_entropy(counts, rows_per_rank, chunk):
    ranks = pool.run(len(counts), _run, counts, rows_per_rank, chunk, torch.float64)
    loss, dhidden_NH, dweight_VH, correct_N = _truth(counts)
    for rank in ranks:
        assert rank["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
        assert rank["loss"].item() == ranks[0]["loss"].item()
    torch.testing.assert_close(torch.cat([r["dhidden"] for r in ranks]), dhidden_NH, rtol=1e-11, atol=1e-12)
    weight = torch.cat([r["dweight"] for r in ranks])
    torch.testing.assert_close(weight[:TRUE_VOCABULARY], dweight_VH, rtol=1e-11, atol=1e-12)
    assert weight[TRUE_VOCABULARY:].count_nonzero() == 0
    assert torch.equal(torch.cat([r["correct"] for r in ranks]), correct_N)


def test_bfloat16_hidden_states_give_a_float32_loss_and_gradients_in_their_own_dtype():
    counts = [4, 9]
    ranks = pool.run(2, _run, counts, 12, 4, torch.bfloat16)
    loss, dhidden_NH, _, _ = _truth(counts)
    assert all(rank["loss"].dtype == torch.float32 for rank in ranks)
    assert ranks[0]["loss"].item() == pytest.approx(loss.item(), rel=2e-2)
    found = torch.cat([r["dhidden"] for r in ranks])
    assert found.dtype == torch.bfloat16
    assert (found - dhidden_NH).norm() <= 3e-2 * dhidden_NH.norm()

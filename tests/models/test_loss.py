"""The fused head against plain float64 cross-entropy."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.models.loss import BackwardTile, ForwardTile, Vocabulary, fused_head
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import HEAD_LOGIT_BYTES
from tests.gpu import needs_a_gpu
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


def _truth(counts: list[int], soft_cap: float | None) -> tuple[torch.Tensor, ...]:
    """Loss, gradients for a loss counted three times, and which predictions are right."""
    hidden_NH, weight_VH, labels_N = _case(counts)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    logits_NV = hidden_NH @ weight_VH.t()
    if soft_cap is not None:
        logits_NV = soft_cap * torch.tanh(logits_NV / soft_cap)
    loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    (3 * loss).backward()
    return loss.detach(), hidden_NH.grad, weight_VH.grad, logits_NV.argmax(1) == labels_N


def _run(
    rank: int, counts: list[int], rows_per_rank: int, logit_bytes: int, dtype: torch.dtype, soft_cap: float | None = None
) -> dict[str, torch.Tensor]:
    """This rank's part: ``counts[rank]`` tokens and ``rows_per_rank`` rows of the padded output layer."""
    hidden_NH, weight_VH, labels_N = _case(counts)
    # Whoever reads a padding row gets a loss that is not finite.
    padded_VH = torch.full((rows_per_rank * len(counts), HIDDEN), torch.nan, dtype=torch.float64)
    padded_VH[:TRUE_VOCABULARY] = weight_VH
    first = rows_per_rank * rank
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    hidden_nH = hidden_NH[mine].to(dtype).requires_grad_()
    weight = padded_VH[first : first + rows_per_rank].to(dtype).requires_grad_()
    vocabulary = Vocabulary(first, max(0, min(rows_per_rank, TRUE_VOCABULARY - first)), dist.group.WORLD)
    output = fused_head(hidden_nH, weight, labels_N[mine], counts, vocabulary, logit_bytes, soft_cap)
    (3 * output.loss_sum).backward()
    return {
        "loss": output.loss_sum.detach(),
        "correct": output.correct_n,
        "dhidden": hidden_nH.grad,
        "dweight": weight.grad,
    }


WHOLE = HEAD_LOGIT_BYTES
CASES = [
    ([7], 21, WHOLE),
    # Pieces of 2 tokens, two times one, and blocks of 6 rows by 6 tokens.
    ([7], 24, 24 * 24 * 2),
    ([7], 24, 1),
    ([0], 24, 1),
    ([5, 2], 11, 11 * 24 * 4),
    ([0, 6], 12, 12 * 24 * 4),
    ([0, 0], 12, WHOLE),
    ([4, 1, 0, 9], 6, 6 * 24 * 8),
    ([3, 0, 0, 0], 6, 1),
    # The last rank holds nothing but padding.
    ([2, 3, 1, 4], 7, WHOLE),
    ([2, 3, 1, 4], 8, 8 * 24 * 4),
    ([0, 0, 0, 0], 8, 1),
]


@pytest.mark.parametrize(
    ("counts", "rows_per_rank", "logit_bytes", "soft_cap"),
    [*((*case, None) for case in CASES), ([7], 24, 24 * 24 * 2, 1.7), ([4, 1, 0, 9], 6, 6 * 24 * 8, 1.7)],
)
def test_loss_gradients_and_hits_equal_plain_cross_entropy(counts, rows_per_rank, logit_bytes, soft_cap):
    ranks = pool.run(len(counts), _run, counts, rows_per_rank, logit_bytes, torch.float64, soft_cap)
    loss, dhidden_NH, dweight_VH, correct_N = _truth(counts, soft_cap)
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
    ranks = pool.run(2, _run, counts, 12, 12 * 8 * 4, torch.bfloat16)
    loss, dhidden_NH, _, _ = _truth(counts, None)
    assert all(rank["loss"].dtype == torch.float32 for rank in ranks)
    assert ranks[0]["loss"].item() == pytest.approx(loss.item(), rel=2e-2)
    found = torch.cat([r["dhidden"] for r in ranks])
    assert found.dtype == torch.bfloat16
    assert (found - dhidden_NH).norm() <= 3e-2 * dhidden_NH.norm()


@pytest.mark.parametrize("rows", [21, 24])
def test_products_are_as_wide_as_tensor_cores_want_them(rows):
    """But for those of the last few rows of the vocabulary."""
    [shapes] = pool.run(1, _product_shapes, rows)
    widths = {size for shape in shapes for size in shape}
    assert 8 * (rows // 8) in widths
    assert {size for size in widths if size % 8} == ({rows % 8} if rows % 8 else set())


def _product_shapes(rank: int, rows: int) -> list[tuple[int, ...]]:
    """Operands of all matrix products for 16 tokens, hidden size 8 and so many rows of 24."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                shapes.extend(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))
            return op(*args, **(kwargs or {}))

    shapes = []
    hidden_nH, weight_VH = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (16, 24))
    with Record():
        vocabulary = Vocabulary(0, rows, dist.group.WORLD)
        fused_head(hidden_nH, weight_VH, torch.arange(16), [16], vocabulary).loss_sum.backward()
    return shapes


def test_gradients_are_not_taken_twice():
    hidden_nH = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    [message] = pool.run(1, _twice, hidden_nH.detach())
    assert "taken before" in message


def _twice(rank: int, hidden_nH: torch.Tensor) -> str:
    weight_VH = torch.ones(3, HIDDEN, dtype=torch.float64)
    labels_n = torch.zeros(len(hidden_nH), dtype=torch.long)
    loss = fused_head(hidden_nH.requires_grad_(), weight_VH, labels_n, [5], Vocabulary(0, 3, dist.group.WORLD)).loss_sum
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Megatron's gradient buffers


class _Tied(MegatronModule):
    """Each token is predicted from the table's row of the token before, scaled; the table is the output layer too."""

    def __init__(self, config: TransformerConfig, table_VH: torch.Tensor, tied: bool, logit_bytes: int) -> None:
        super().__init__(config)
        self.embedding = torch.nn.Parameter(table_VH.clone())
        self.output = self.embedding if tied else torch.nn.Parameter(table_VH.flip(0).clone())
        self.scale = torch.nn.Parameter(table_VH.new_ones(table_VH.shape[1]))
        self.logit_bytes = logit_bytes

    def forward(self, tokens_S: torch.Tensor, vocabulary: Vocabulary | None) -> torch.Tensor:
        hidden_SH = self.embedding[tokens_S[:-1]] * self.scale
        labels_S = tokens_S[1:]
        if vocabulary is None:
            return F.cross_entropy(hidden_SH @ self.output.t(), labels_S, reduction="sum")
        return fused_head(hidden_SH, self.output, labels_S, [len(labels_S)], vocabulary, self.logit_bytes).loss_sum


def _buffers(rank: int, tied: bool, overlap: bool, dtype: torch.dtype, in_fp32: bool, logit_bytes: int) -> dict:
    """Worst relative error, against autograd in float64, of the gradients that two micro-batches leave in DDP's buffers."""
    topology = ParallelTopology.create(ParallelConfig())
    torch.manual_seed(3)
    # Exact in bfloat16.
    table_VH = torch.randn(TRUE_VOCABULARY, 8).bfloat16().double()
    batches = [torch.randint(TRUE_VOCABULARY, (n,)) for n in (30, 1, 12)]
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    truth, model = (_Tied(config, table_VH.to(kind), tied, logit_bytes) for kind in (torch.float64, dtype))
    sum(truth(tokens, None) for tokens in batches).backward()
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=overlap, grad_reduce_in_fp32=in_fp32)
    ddp = DistributedDataParallel(config, ddp_config, model)
    ddp.zero_grad_buffer()
    vocabulary = Vocabulary(0, TRUE_VOCABULARY, topology.tp)
    for tokens in batches[:-1]:
        with ddp.no_sync():
            ddp(tokens, vocabulary).backward()
    ddp(batches[-1], vocabulary).backward()
    ddp.finish_grad_sync()
    wanted, found = dict(truth.named_parameters()), dict(model.named_parameters())
    assert all(parameter.grad is None for parameter in found.values())
    assert found["output" if not tied else "embedding"].main_grad.dtype == (torch.float32 if in_fp32 else dtype)
    errors = {n: ((p.main_grad - wanted[n].grad).norm() / wanted[n].grad.norm()).item() for n, p in found.items()}
    topology.destroy()
    return errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("logit_bytes", [WHOLE, 12 * 8 * 4])
@pytest.mark.parametrize(
    ("overlap", "dtype", "in_fp32", "bound"),
    [
        (False, torch.float64, False, 1e-13),
        (True, torch.float64, False, 1e-13),
        (True, torch.bfloat16, False, 1e-2),
        (True, torch.bfloat16, True, 1e-2),
    ],
)
def test_micro_batches_add_up_in_the_gradient_buffers_of_ddp(tied, overlap, dtype, in_fp32, logit_bytes, bound):
    [errors] = pool.run(1, _buffers, tied, overlap, dtype, in_fp32, logit_bytes)
    assert max(errors.values()) < bound, errors


def test_an_output_layer_in_ddp_leaves_no_gradient_of_its_size_to_autograd():
    [shapes] = pool.run(1, _dense_gradients)
    assert shapes == []


def _dense_gradients(rank: int) -> list[torch.Size]:
    """Shapes of the dense gradients that arrive at a weight with a buffer."""
    weight_VH = torch.nn.Parameter(torch.randn(TRUE_VOCABULARY, HIDDEN))
    weight_VH.main_grad = torch.zeros_like(weight_VH)
    shapes = []
    weight_VH.register_hook(lambda grad: shapes.append(grad.shape) if grad.layout == torch.strided else None)
    vocabulary = Vocabulary(0, TRUE_VOCABULARY, dist.group.WORLD)
    fused_head(torch.randn(4, HIDDEN), weight_VH, torch.arange(4), [4], vocabulary).loss_sum.backward()
    assert weight_VH.main_grad.count_nonzero() > 0
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("hidden", [3584, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_of_a_large_vocabulary_stay_within_their_bytes(tp, hidden, dtype):
    rows, narrow = 152064 // tp, dtype.itemsize
    forward, backward = ForwardTile.of(rows, dtype, WHOLE), BackwardTile.of(rows, dtype, WHOLE)
    assert rows * (forward.tokens * narrow + forward.scored * 4) <= WHOLE
    assert backward.tokens * backward.rows * (narrow + 4) <= WHOLE
    # What a tp rank gathers and sends, and in 16 bit the float32 sums of a block.
    gathered, own = (1 + 1 / tp, 1) if tp > 1 else (0, 0)
    assert WHOLE + forward.tokens * hidden * narrow * (gathered + own) < 2**30
    sums = backward.rows * hidden * 4 if narrow == 2 else 0
    assert WHOLE + backward.tokens * hidden * narrow * gathered + sums < 2**30
    # Fewer would leave most of a GPU idle.
    assert forward.tokens >= 512 and forward.tokens % 128 == 0
    assert backward.tokens >= 4096 and backward.rows % 128 == 0


def _large(tokens: int, rows: int, hidden: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands in bfloat16 whose logits have about the standard deviation ``spread``."""
    generator = torch.Generator("cuda").manual_seed(7)
    options = {"device": "cuda", "generator": generator}
    hidden_nH = torch.randn(tokens, hidden, dtype=torch.bfloat16, **options)
    weight_VH = torch.randn(rows, hidden, dtype=torch.bfloat16, **options) * (spread / hidden**0.5)
    return hidden_nH, weight_VH, torch.randint(rows, (tokens,), **options)


def _errors_of_heads(rank: int, spread: float, logit_bytes: int) -> dict[str, tuple[float, float, float]]:
    """Relative errors of loss and both gradients against float64, of each head."""
    hidden_nH, weight_VH, labels_n = _large(3000, 5001, 1024, spread)

    def gradients(loss, dtype=torch.bfloat16, in_fp32=False):
        hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden_nH, weight_VH))
        if in_fp32:
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        total = loss(hidden, weight)
        total.backward()
        return total.detach(), hidden.grad, weight.main_grad if in_fp32 else weight.grad

    def eager(hidden, weight):
        return F.cross_entropy(
            (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), labels_n, reduction="sum"
        )

    def fused(hidden, weight):
        vocabulary = Vocabulary(0, len(weight), dist.group.WORLD)
        return fused_head(hidden, weight, labels_n, [len(labels_n)], vocabulary, logit_bytes).loss_sum

    truth = gradients(eager, torch.float64)
    heads = {
        "eager": gradients(eager),
        "float32": gradients(eager, torch.float32),
        "fused": gradients(fused),
        "fused, float32 sums": gradients(fused, in_fp32=True),
    }
    return {
        name: tuple(((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True))
        for name, found in heads.items()
    }


@needs_a_gpu
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("logit_bytes", [WHOLE, 2**23])
def test_on_a_gpu_no_gradient_errs_more_than_that_of_whole_logits(spread, logit_bytes):
    [errors] = pool.run(1, _errors_of_heads, spread, logit_bytes)
    for name, values in errors.items():
        print(f"spread {spread:g}, {logit_bytes} bytes, {name}: loss, dhidden, dweight", *(f"{x:.2e}" for x in values))
    for name in ("fused", "fused, float32 sums"):
        assert all(x <= y for x, y in zip(errors[name], errors["eager"], strict=True)), errors


def _extra_bytes(rank: int, in_fp32: bool) -> int:
    """Peak of a forward and backward pass beyond operands and their gradients."""
    hidden_nH, weight_VH, labels_n = (
        x.requires_grad_(x.is_floating_point()) for x in _large(131072, 152064, 4096, 1.0)
    )
    if in_fp32:
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    vocabulary = Vocabulary(0, len(weight_VH), dist.group.WORLD)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_head(hidden_nH, weight_VH, labels_n, [len(labels_n)], vocabulary).loss_sum.backward()
    gradients = hidden_nH.nbytes + (0 if in_fp32 else weight_VH.nbytes)
    return torch.cuda.max_memory_allocated() - before - gradients


@needs_a_gpu
@pytest.mark.parametrize("in_fp32", [False, True])
def test_on_a_gpu_a_large_head_needs_less_than_a_gib_beyond_its_operands_and_gradients(in_fp32):
    [extra] = pool.run(1, _extra_bytes, in_fp32)
    print(f"float32 sums {in_fp32}: {extra / 2**30:.3f} GiB")
    assert extra < 2**30

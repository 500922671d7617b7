"""Output layer and loss alone: forward and backward pass, every token supervised, and how far the gradients are from float64.

``method`` is ``fused`` (this project) or ``eager``: all logits in bfloat16, then in float32. With ``main_grad=1`` the fused head
adds the weight gradient to a float32 buffer, as under Megatron's DDP; else autograd gets it in bfloat16.

Settings: ``tokens`` (of the tp group, unless the variant says otherwise), ``hidden``, ``vocab``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.predicted import head_alone
from benchmarks.worker import Measured, measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.models.loss import Vocabulary, fused_head
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB

VARIANT = {"method": ("fused", "eager"), "tp": 1, "tokens": 0, "main_grad": 1}
SAMPLE = 256
"""Tokens that gradients are compared on."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Vocabulary], torch.Tensor]


def rows(settings: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """That of the variant ``text``."""
    variant = parse_variant(text, VARIANT)
    method, tp, hidden, vocab = variant["method"], variant["tp"], settings["hidden"], settings["vocab"]
    if method == "eager" and tp > 1:
        raise ValueError(f"variant {text}: method=eager knows no tensor parallelism; use tp=1")
    tokens = variant["tokens"] or settings["tokens"]
    if tokens % tp or vocab % tp:
        raise ValueError(f"variant {text}: tp={tp} does not divide {tokens} tokens and {vocab} vocabulary rows")
    topology = ParallelTopology.create(ParallelConfig(tp=tp))
    in_buffer = method == "fused" and bool(variant["main_grad"])
    found, kept = _measure(settings, LOSSES[method], in_buffer, tokens, topology)
    tokens_per_s = tokens * topology.grid.dp / found.seconds / dist.get_world_size()
    element = accelerator.dtype_of("auto").itemsize
    predicted = head_alone(tokens, hidden, vocab, element, 4 if in_buffer else element)
    note = f"{(found.peak_bytes - kept) / GIB:.3f} GiB beyond operands and gradients; relative gradient errors"
    topology.destroy()
    # Only now: what is compiled first is compiled for the lengths that are timed.
    note += " {:.2e} (hidden) {:.2e} (weight)".format(*_worst_errors(LOSSES[method], in_buffer, hidden, vocab))
    row = {
        "model": f"{tokens} tokens, hidden {hidden}, vocabulary {vocab}",
        "part": "both",
        "tp": tp,
        "ulysses": 1,
        "ring": 1,
        "seq_len": tokens,
        "tokens_per_s_per_gpu": round(tokens_per_s, 1),
        "tflops_per_gpu": float(f"{6 * hidden * vocab * tokens_per_s / 1e12:.4g}"),
        "note": note,
        **found.columns(predicted if method == "fused" and tp == 1 else None),
    }
    return [row]


def _measure(
    settings: dict[str, Any], loss: Loss, in_buffer: bool, tokens: int, topology: ParallelTopology
) -> tuple[Measured, int]:
    """Time and peak of forward and backward pass, and the bytes of what is there anyway: operands and gradients."""
    tp, hidden, vocab = topology.grid.tp, settings["hidden"], settings["vocab"]
    counts, part = [tokens // tp] * tp, Vocabulary(topology.place.tp * vocab // tp, vocab // tp, topology.tp)
    hidden_nH, weight_VH, labels_n = _operands(counts[0], hidden, vocab, part.rows, in_buffer)

    def step():
        hidden_nH.grad = weight_VH.grad = None
        loss(hidden_nH, weight_VH, labels_n, counts, part).backward()

    found = measure(step, settings["warmup"], settings["timed"])
    dweight = weight_VH.main_grad if in_buffer else weight_VH.grad
    return found, 2 * hidden_nH.nbytes + weight_VH.nbytes + dweight.nbytes


def _operands(
    tokens: int, hidden: int, vocab: int, held: int, in_buffer: bool
) -> tuple[torch.Tensor, torch.nn.Parameter, torch.Tensor]:
    """Hidden states, the ``held`` rows of the output layer, whose logits have deviation 1, and labels in the whole vocabulary.
    The gradient of the weight is summed ``in_buffer`` of float32, or formed by autograd."""
    device, dtype = accelerator.device(), accelerator.dtype_of("auto")
    torch.manual_seed(0)
    hidden_nH = torch.randn(tokens, hidden, device=device, dtype=dtype).requires_grad_()
    weight_VH = torch.nn.Parameter(torch.randn(held, hidden, device=device, dtype=dtype) / hidden**0.5)
    if in_buffer:
        weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
    return hidden_nH, weight_VH, torch.randint(vocab, (tokens,), device=device)


def _fused(hidden_nH, weight_VH, labels_n, counts, part) -> torch.Tensor:
    return fused_head(hidden_nH, weight_VH, labels_n, counts, part).loss_sum


def _eager(hidden_nH, weight_VH, labels_n, counts, part) -> torch.Tensor:
    logits_nV = hidden_nH @ weight_VH.t()
    return F.cross_entropy(logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)), labels_n, reduction="sum")


LOSSES: dict[str, Loss] = {"fused": _fused, "eager": _eager}


def _worst_errors(loss: Loss, in_buffer: bool, hidden: int, vocab: int) -> tuple[float, float]:
    """Relative errors of the gradients of hidden states and weight against float64, without tensor parallelism.

    The largest over all ranks: collective.
    """
    topology = ParallelTopology.create(ParallelConfig())
    hidden_nH, weight_VH, labels_n = _operands(SAMPLE, hidden, vocab, vocab, in_buffer)
    others = (labels_n, [SAMPLE], Vocabulary(0, vocab, topology.tp))
    wide = [x.detach().double().requires_grad_() for x in (hidden_nH, weight_VH)]
    wanted = torch.autograd.grad(_eager(*wide, *others), wide)
    loss(hidden_nH, weight_VH, *others).backward()
    found = (hidden_nH.grad, weight_VH.main_grad if in_buffer else weight_VH.grad)
    errors = torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, wanted, strict=True)])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    topology.destroy()
    return tuple(errors.tolist())

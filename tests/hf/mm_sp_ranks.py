"""What each rank does in the tests of MM-SP under Transformers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_vila.hf.mm_sp import MMSP, enable_mm_sp
from tests.hf.mm_sp_cases import build, in_float64, relative_errors, truth
from tests.ranks import pool


@dataclass(frozen=True)
class Case:
    """A model and how it is spread. ``steps`` lists micro-batches, each a list of samples for each data-parallel replica."""

    name: str
    ulysses: int
    ring: int
    steps: list[list[list[dict]]]
    double: bool = False
    weights: str = "plain"
    recompute: bool = False
    frame_micro_batch: int = 16
    kernel: str = "auto"
    model: dict = field(default_factory=dict)


def make(case: Case) -> tuple[torch.nn.Module, MMSP]:
    model = build(case.name, **case.model)
    if case.double:
        model = in_float64(model)
    if case.recompute:
        model.activation_checkpointing_enable()
    mm_sp = enable_mm_sp(model, case.ulysses, case.ring, None, case.kernel, case.frame_micro_batch)
    if case.weights.startswith("fsdp"):
        shard(model, layers=case.weights == "fsdp")
    return model, mm_sp


FULL_PRECISION = MixedPrecisionPolicy()


def shard(model: torch.nn.Module, layers: bool = True, policy: MixedPrecisionPolicy = FULL_PRECISION) -> None:
    """FSDP2 over all ranks, each layer of tower and language model by itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if layers and type(module).__name__.endswith(("DecoderLayer", "EncoderLayer", "VisionBlock", "Projector", "Merger")):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def gradients(model: torch.nn.Module, weights: str) -> dict[str, torch.Tensor]:
    """Whole gradients, averaged over the ranks as FSDP2 and DDP do it."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if weights.startswith("fsdp"):
            grad = grad.full_tensor()
        elif weights == "plain":
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        grads[name] = grad
    return grads


def train(rank: int, case: Case, wanted_loss: float, wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors of the loss and of each gradient after the micro-batches of one step."""
    model, mm_sp = make(case)
    # A stock LLaVA-OneVision does not use the last norm of its tower.
    is_used = case.name != "llava_onevision"
    called = DistributedDataParallel(model, find_unused_parameters=not is_used) if case.weights == "ddp" else model
    collate = mm_sp.collator()
    batches = [collate(replicas[mm_sp.dp_rank]) for replicas in case.steps]
    count = mm_sp.count_supervised(batches) if len(batches) > 1 else None
    loss = 0.0
    for i, batch in enumerate(batches):
        if case.weights == "fsdp":
            model.set_requires_gradient_sync(i + 1 == len(batches))
        out = called(**batch, num_items_in_batch=count)
        out.loss.backward()
        loss += out.loss.item()
    errors = relative_errors(gradients(model, case.weights), wanted)
    return {"loss": abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-30)} | errors


def train_each(rank: int, cases: list[tuple[Case, float, dict[str, torch.Tensor]]]) -> list[dict[str, float]]:
    """``train`` of several cases, each with the loss and the gradients that are wanted."""
    return [train(rank, *case) for case in cases]


def largest_errors(cases: list[Case]) -> list[dict[str, float]]:
    """For each case, all of one layout, the largest relative errors over the ranks: of the loss, of each gradient and of ``all``
    together."""
    with_truth = []
    for case in cases:
        model = build(case.name, **case.model)
        samples = [sample for step in case.steps for replica in step for sample in replica]
        with_truth.append((case, *truth(in_float64(model) if case.double else model, samples)))
    results = pool.run(cases[0].ulysses * cases[0].ring * len(cases[0].steps[0]), train_each, with_truth)
    return [{key: max(one[key] for one in ranks) for key in ranks[0]} for ranks in zip(*results, strict=True)]


def untouched(rank: int, case: Case) -> set[str]:
    """Weights that get no gradient, not even zeros, from the first micro-batch."""
    model, mm_sp = make(case)
    model(**mm_sp.collator()(case.steps[0][0])).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}

"""What each rank does in the gradient-contract tests: build the model in a layout, run a step, compare with the truth."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vila import accelerator, processes
from megatron_vila.config.schema import Config, LanguageConfig, ParallelConfig
from megatron_vila.data.loader import LoadedRow
from megatron_vila.models.initialize import global_name, tensor_parallel_slice
from megatron_vila.models.shard import RowShard
from megatron_vila.models.vila import VilaModel
from megatron_vila.models.vision.tower import encode_frames
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import Document, Row, pack
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.training.optimizer import finalize_gradients
from megatron_vila.training.step import Pass, RowReport, mean_loss
from tests import truth
from tests.samples import pixels

CPU = torch.device("cpu")
Rows = list[list[Document]]


def build(
    config: Config, parallel: ParallelConfig, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> tuple[ParallelTopology, VilaModel, int]:
    """Topology, model with weights that are a function of their global names, and its first layer's number."""
    topology = ParallelTopology.create(parallel)
    model_parallel_cuda_manual_seed(1)
    model = VilaModel(config, topology, dtype, device)
    offset = topology.place.pp * (config.model.llm.num_layers // topology.grid.pp)
    tied = config.model.llm.tie_embeddings
    with torch.no_grad():
        for local, parameter in model.named_parameters():
            name = global_name(local, offset)
            if tied and name == "llm.output_layer.weight":
                name = "llm.embedding.word_embeddings.weight"
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= topology.grid.tp
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
            noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            # Exact in bfloat16, so that every precision has the same weights.
            full = (noise * config.model.init_std + (1.0 if parameter.dim() == 1 else 0.0)).bfloat16().double()
            parameter.copy_(tensor_parallel_slice(full, name, parameter, topology.grid.tp, topology.place.tp))
    return topology, model, offset


def write_truth(rank: int, config: Config, rows: Rows, path: Path) -> None:
    """Sum of losses, its gradients and the number of supervised tokens of the single-process truth, to ``path``."""
    topology, model, _ = build(config, ParallelConfig())
    weights = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    supervised = 0
    for document in (d for row in rows for d in row):
        visual = made(model, pixels(document.frames))
        total = total + truth.loss_sum(truth.document_logits(weights, config.model, document, visual), document)
        supervised += int((document.labels >= 0).sum())
    total.backward()
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    torch.save({"loss_sum": total.detach(), "supervised": supervised, "grads": grads}, path)
    topology.destroy()


def write_truth_in_a_process_without_gpus(config: Config, rows: Rows, path: Path) -> None:
    """``write_truth`` where the pool's processes have GPUs: Megatron-Core's CPU redirections need a process without."""
    context = multiprocessing.get_context("spawn")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        process = context.Process(target=_alone, args=(config, rows, path))
        process.start()
        process.join()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    if process.exitcode:
        raise RuntimeError(f"the truth was not written: exit status {process.exitcode}")


def loaded(documents: list[Document], topology: ParallelTopology) -> LoadedRow:
    """The row of ``documents`` with its plan and the frames that this rank encodes."""
    row = pack(documents, topology.grid.document_multiple, topology.grid.row_multiple)
    plan = RowPlan.of(row, topology.grid).shard(topology.rank)
    return LoadedRow(0, plan, pixels([row.frames[i] for i in plan.frames]))


def made(model: VilaModel, pixels_F3HW: torch.Tensor) -> torch.Tensor:
    """Visual tokens [N, H] of frames, as a model takes them."""
    return encode_frames(model.vision, model.projector, pixels_F3HW).flatten(0, 1)


def shard_of(row: Row, topology: ParallelTopology, llm: LanguageConfig, dtype: torch.dtype) -> RowShard:
    """This rank's part of ``row`` on the CPU."""
    return RowShard.of(RowPlan.of(row, topology.grid).shard(topology.rank), topology, llm, dtype, CPU)


def _alone(config: Config, rows: Rows, path: Path) -> None:
    accelerator.prepare()
    processes.init_distributed()
    write_truth(0, config, rows, path)


def steps(
    config: Config, rows: Rows, parallel: ParallelConfig, dtype: torch.dtype
) -> tuple[ParallelTopology, VilaModel, int, Callable[[], list[RowReport]]]:
    """As ``build``, under DDP; and a call that leaves the gradients of a whole step in the buffers and returns its reports.

    Rows go round-robin to data-parallel replicas, several per replica as micro-batches. On a machine with GPUs each rank uses
    its own.
    """
    device = accelerator.device()
    topology, model, offset = build(config, parallel, dtype, device)
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=dtype == torch.bfloat16)
    ddp = DistributedDataParallel(model.config, ddp_config, model)
    model.config.finalize_model_grads_func = finalize_gradients
    model.config.no_sync_func = ddp.no_sync
    batches = [loaded(documents, topology) for documents in rows[topology.place.dp :: topology.grid.dp]]
    forward = Pass(ddp, topology, config.model.llm)

    def step():
        ddp.zero_grad_buffer()
        return forward.run(batches)

    return topology, model, offset, step


def repeat(rank: int, config: Config, rows: Rows, parallel: ParallelConfig, dtype: torch.dtype, times: int) -> list[str]:
    """Names of the parameters whose gradients differ in any bit between ``times`` equal steps, in deterministic mode."""
    accelerator.set_deterministic(True)
    topology, model, _, step = steps(config, rows, parallel, dtype)
    first, wrong = {}, set()
    for _ in range(times):
        step()
        found = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        first = first or found
        wrong |= {name for name, gradient in found.items() if not torch.equal(gradient, first[name])}
    topology.destroy()
    accelerator.set_deterministic(False)
    return sorted(wrong)


def compare(
    rank: int, config: Config, rows: Rows, parallel: ParallelConfig, path: Path, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """Relative errors of this rank's loss and of each of its parameters' gradients against the truth in ``path``."""
    topology, model, offset, step = steps(config, rows, parallel, dtype)
    loss, _ = mean_loss(step(), topology, accelerator.device())
    reference = torch.load(path, weights_only=True)
    grads, tokens = reference["grads"], max(reference["supervised"], 1)
    wanted = reference["loss_sum"].item() / tokens
    errors = {"loss": abs(loss - wanted) / max(abs(wanted), 1e-30)}
    for local, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = global_name(local, offset)
        if config.model.llm.tie_embeddings and name == "llm.output_layer.weight":
            name = "llm.embedding.word_embeddings.weight"
        full = grads[name]
        if name.startswith("llm.") and full.shape != parameter.shape:
            full = tensor_parallel_slice(full, name, parameter, topology.grid.tp, topology.place.tp)
        errors[name] = (parameter.main_grad.double().cpu() * tokens - full).abs().max().item() / _scale(name, grads)
    topology.destroy()
    return errors


def _scale(name: str, grads: dict[str, torch.Tensor]) -> float:
    """Largest entry of the whole gradient (a slice may be all zeros). A key bias shifts all scores of a query alike, so its
    true gradient is zero and the query bias sets the scale."""
    return max(grads[name.replace("k_proj.bias", "q_proj.bias")].abs().max().item(), 1e-12)

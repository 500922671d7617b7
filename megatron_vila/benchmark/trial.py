"""A few whole training steps on a made-up row: model, DDP, optimizer and schedule as in the trainer, no files to decode.

Used to find the longest row that trains. The row is one video of as many frames as fit, or text alone, with random pixels and
token ids; its last tokens are supervised (``supervised`` of them).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vila import platform
from megatron_vila.benchmark.table import hardware, versions
from megatron_vila.config.load import load_config
from megatron_vila.config.memory import GIB, estimate_memory
from megatron_vila.config.schema import Config
from megatron_vila.data.row import IGNORE, MEDIA_TOKEN, Document, pack
from megatron_vila.explain.sample import made_up_document
from megatron_vila.models.shard import local_frames
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.training.flops import mfu, model_flops, peak_flops
from megatron_vila.training.optimizer import apply_step, build_optimizer, wrap_ddp
from megatron_vila.training.step import MicroBatch, Pass, mean_loss


def rows(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``settings``: ``config``, ``overrides`` (train.seq_length among them), ``frames`` (0: text), ``supervised``, ``steps``,
    ``command``. One row: the last step's time and the peak of the fullest rank."""
    config = load_config(settings["config"], settings["overrides"])
    device = platform.device()
    dtype = platform.dtype_of(config.train.precision)
    topology = ParallelTopology.create(config.parallel)
    model_parallel_cuda_manual_seed(config.train.seed)
    model = wrap_ddp(built := VilaModel(config, topology, dtype, device), config.optim, built.config)
    optimizer, _ = build_optimizer([model], config.optim, config.train, dtype)
    grid = topology.grid
    document = made_up(config, settings["frames"], settings["supervised"])
    row = pack([document], grid.document_multiple, grid.row_multiple)
    size, frames = config.model.vision.image_size, len(local_frames(row, topology))
    batch = MicroBatch(row, torch.zeros(frames, 3, size, size, dtype=torch.float32))
    forward = Pass(model, topology, config.model.llm, dtype, device)
    platform.reset_peak_memory()
    for _ in range(settings["steps"]):
        platform.synchronize()
        start = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss, _ = mean_loss(forward.run([batch]), topology, device)
        apply_step(optimizer)
        platform.synchronize()
        seconds = time.perf_counter() - start
    worst = torch.tensor([seconds, platform.peak_memory_bytes()], dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, peak_bytes = worst.tolist()
    world = dist.get_world_size()
    flops = model_flops(row.lengths, row.supervised_tokens, len(row.frames), config.model, config.optim).total * grid.dp
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
    share = mfu(flops, seconds, world, peak)
    yield {
        "model": config.model.name,
        "gpus": world,
        **{axis: getattr(config.parallel, axis) for axis in ("tp", "pp", "ulysses", "ring")},
        "attention": config.model.attention,
        "seq_len": len(document),
        "frames": len(row.frames),
        "time_s": round(seconds, 4),
        "tokens_per_s_per_gpu": round(len(document) / seconds / world, 1),
        "tflops_per_gpu": float(f"{flops / seconds / world / 1e12:.4g}"),
        "mfu": "" if share is None else round(share, 4),
        "peak_gib": round(peak_bytes / GIB, 3),
        "predicted_gib": round(estimate_memory(config, world, device.type == "cuda").total / GIB, 3),
        "first_loss": round(loss, 5),
        "hardware": hardware(world),
        "versions": versions(),
        "command": settings["command"],
    }
    topology.destroy()


def made_up(config: Config, frames: int, supervised: int) -> Document:
    """``train.seq_length`` tokens: a video of ``frames`` frames, text around it, and labels at its last ``supervised`` tokens."""
    per_frame = len(made_up_document(config, 1, 0))
    document = made_up_document(config, frames, config.train.seq_length - frames * per_frame)
    text = document.token_ids != MEDIA_TOKEN
    token_ids = document.token_ids.copy()
    token_ids[text] = np.random.default_rng(0).integers(config.model.llm.vocab_size, size=int(text.sum()))
    labels = np.full(len(document), IGNORE)
    labels[-supervised - 1 : -1] = np.where(text[-supervised:], token_ids[-supervised:], IGNORE)
    return dataclasses.replace(document, token_ids=token_ids, labels=labels)

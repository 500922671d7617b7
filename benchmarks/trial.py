"""Whole training steps on a made-up row: model, DDP, optimizer and schedule as in the trainer, no files to decode.

The row is one video of as many frames as fit, or text alone, with random pixels and token ids. A variant is a set of
configuration overrides. ``partial`` shows that a step fits where a whole one would take too long: forward pass, head, and the
backward pass of the last layers, where the most memory is in use; Adam's state is there from the start. ``without_attention``
makes it quicker still (``benchmarks/unfilled.py``); such rows tell of memory alone. ``vision_s`` is what the last step spent on
frames: pixels to the device, tower, projector and stage 2, forward and backward, on the slowest rank. The lookup of text tokens
between them counts with it.

Settings: ``config``, ``overrides``, ``video``, ``supervised`` (last tokens of a row, 0: all), ``short_warmup`` (warm up on rows
of an eighth), ``partial`` (layers, 0: whole steps), ``without_attention``.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from benchmarks import unfilled
from benchmarks.table import rates
from benchmarks.worker import measure
from megatron_vila import accelerator
from megatron_vila.checkpoint.optimizer_shards import ensure_state
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.data.loader import LoadedRow
from megatron_vila.explain.sample import made_up_document
from megatron_vila.models.language import attention_kernel
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.memory import estimate_memory
from megatron_vila.plan.pictures import most_frames, pictures_of
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, pack
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.training.optimizer import apply_step, build_optimizer, part_of, wrap_ddp
from megatron_vila.training.step import Pass, mean_loss

FRAME_SHARE = 15 / 16
"""Part of a video row that is frames."""


def rows(settings: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """That of the variant ``text``."""
    length = settings["length"]
    chosen = [*settings["overrides"], *filter(None, text.split(",")), f"train.seq_length={length}", "train.steps=10"]
    config = load_config(settings["config"], chosen)
    if settings["without_attention"]:
        unfilled.register()
        config.model.attention = unfilled.NAME
    device, dtype = accelerator.device(), accelerator.dtype_of(config.train.precision)
    topology = ParallelTopology.create(config.parallel)
    config.train.global_batch_size = topology.grid.dp  # one row for each replica
    model_parallel_cuda_manual_seed(config.train.seed)
    model = wrap_ddp(built := _ClockedVila(config, topology, dtype, device), config.optim)
    optimizer, _ = build_optimizer([model], config.optim, config.train, dtype)
    ensure_state(optimizer)
    forward = Pass(model, topology, config.model.llm)
    losses: list[float] = []

    def train(batch: LoadedRow) -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        built.start_clock()
        loss, _ = mean_loss(forward.run([batch]), topology, device)
        apply_step(optimizer)
        losses.append(loss)

    if settings["short_warmup"]:
        shares = (16, 8)[: settings["warmup"]]
        for share, following in zip(shares, (*shares[1:], 1), strict=True):
            train(_batch(config, topology, length // share, settings))
            built.host.scale(share // following)
    batch = _batch(config, topology, length, settings)
    warmup = 0 if settings["short_warmup"] or settings["partial"] else settings["warmup"]
    if settings["partial"]:
        found = measure(lambda: _partial(built, forward, batch, settings["partial"]), 0, 1)
    else:
        found = measure(lambda: train(batch), warmup, settings["timed"])
    row, world = batch.row, dist.get_world_size()
    flops = model_flops(row.lengths, row.supervised_tokens, row.units, config.model, config.optim).total
    replicas_per_s = topology.grid.dp / found.seconds / world
    estimate = estimate_memory(config, world, accelerator.device_memory_bytes())
    whole = not (settings["partial"] or settings["without_attention"])
    vision_s = built.vision_s() if whole and row.frames else 0.0
    most = torch.tensor([built.host.peak_bytes / GIB, vision_s], dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    host_gib, vision_s = most.tolist()
    topology.destroy()
    tokens, speed = sum(row.lengths), {}
    if whole:
        speed = {"tokens_per_s_per_gpu": round(tokens * replicas_per_s, 1)} | rates(flops * replicas_per_s)
    shown = {
        "model": config.model.name,
        **{axis: getattr(config.parallel, axis) for axis in ("tp", "pp", "ulysses", "ring")},
        "attention": attention_kernel(built.llm.decoder),
        "seq_len": tokens,
        "frames": sum(unit.frames for unit in row.units),
        "vision_s": round(vision_s, 4) or "",
        **speed,
        **found.columns(estimate.allocated),
        "host_gib": round(host_gib, 2),
        "first_loss": round(losses[0], 5) if losses else "",
        "note": _note(settings),
    }
    return [shown]


class _ClockedVila(VilaModel):
    """Knows how long the vision part of its last step took on this rank: from the start until the embeddings are there, and
    from the arrival of their gradient until the last gradient of tower and projector. On CUDA by events, so that nobody waits."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._marks: dict[str, Any] = {}
        for name, parameter in self.named_parameters():
            if part_of(name) != "llm" and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _: self._mark("end"))

    def embed(self, *args) -> torch.Tensor:
        embeddings = super().embed(*args)
        self._mark("embedded")
        if embeddings.requires_grad:
            embeddings.register_hook(lambda _: self._mark("gradient", "end"))
        return embeddings

    def start_clock(self) -> None:
        self._mark("start")

    def vision_s(self) -> float:
        """0 on pipeline stages after the first."""
        spans = [("start", "embedded"), ("gradient", "end")]
        return sum(_between(*(self._marks[name] for name in span)) for span in spans if self._marks.keys() >= set(span))

    def _mark(self, *names: str) -> None:
        now = time.perf_counter()
        if torch.cuda.is_available():
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.update(dict.fromkeys(names, now))


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _note(settings: dict[str, Any]) -> str:
    part = f"forward pass, head and backward pass of the last {settings['partial']} layers" if settings["partial"] else ""
    return "; ".join(filter(None, [part, "without attention's products: memory only" * settings["without_attention"]]))


def _batch(config: Config, topology: ParallelTopology, length: int, settings: dict[str, Any]) -> LoadedRow:
    """A row of at most ``length`` tokens and this rank's random frames."""
    document = made_up(config, length, settings["video"], settings["supervised"])
    grid, size = topology.grid, config.model.vision.image_size
    plan = RowPlan.of(pack([document], grid.document_multiple, grid.row_multiple), grid).shard(topology.rank)
    squares = sum(unit.squares for unit in plan.row.units[plan.frames.start : plan.frames.stop])
    return LoadedRow(0, plan, torch.randint(256, (squares, 3, size, size), dtype=torch.uint8))


def made_up(config: Config, length: int, video: bool, supervised: int) -> Document:
    """``length`` tokens: text, or a video with text around it, and labels at its last ``supervised`` tokens (0: all but one)."""
    fit = most_frames(pictures_of(config.model), length, len(config.data.frame_separator_ids))
    frames = int(fit * FRAME_SHARE) if video else 0
    document = made_up_document(config, frames, length - len(made_up_document(config, frames, 0)))
    text = document.token_ids != MEDIA_TOKEN
    token_ids = document.token_ids.copy()
    token_ids[text] = np.random.default_rng(0).integers(config.model.llm.vocab_size, size=int(text.sum()))
    supervised = min(supervised or length, length - 1)
    labels = np.full(length, IGNORE)
    labels[-supervised - 1 : -1] = np.where(text[-supervised:], token_ids[-supervised:], IGNORE)
    return dataclasses.replace(document, token_ids=token_ids, labels=labels)


class _Enough(Exception):
    """The layers that ``partial`` asks for are through."""


def _partial(model: VilaModel, forward: Pass, batch: LoadedRow, layers: int) -> None:
    """A step that ends once the backward pass reaches the layer before the last ``layers`` ones. Without pipeline stages."""
    decoder = model.llm.decoder.layers
    if not 0 < layers < len(decoder):
        raise ValueError(f"--partial {layers} is not between 1 and the model's {len(decoder) - 1} layers")

    def stop(_, inputs):
        # The first call is the forward pass; a layer under a recompute policy is run again in the backward pass.
        if calls:
            raise _Enough
        calls.append(True)
        if inputs[0].requires_grad:
            inputs[0].register_hook(_raise)

    calls: list[bool] = []
    handle = decoder[len(decoder) - layers - 1].self_attention.linear_qkv.register_forward_pre_hook(stop)
    try:
        forward.run([batch])
    except _Enough:
        return
    finally:
        handle.remove()
    raise RuntimeError("the backward pass never came to the layer at which it was to stop")


def _raise(_: torch.Tensor) -> None:
    raise _Enough

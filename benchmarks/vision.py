"""Stage 1 alone: frames per second of tower and projector on each GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.predicted import tower_alone
from benchmarks.table import hardware, versions
from benchmarks.worker import measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower, encode_frames
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.flops import mfu, model_flops
from megatron_vila.plan.pictures import pictures_of

VARIANT = {"frame_micro_batch": 0, "trainable": 1, "recompute": 0}


def rows(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``settings``: ``config``, ``overrides``, ``frames`` (of a rank), ``variants``, ``warmup``, ``timed``, ``command``."""
    for text in settings["variants"]:
        yield _variant(settings, text)


def _variant(settings: dict[str, Any], text: str) -> dict[str, Any]:
    variant = parse_variant(text, VARIANT)
    config = config_of(settings, variant)
    model, device = config.model, accelerator.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tower = VisionTower(model.vision, model.init_std).to(device, dtype)
    projector = Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std).to(device, dtype)
    tower.set_trainable(config.optim.vision.trainable)
    projector.requires_grad_(config.optim.projector.trainable)
    size, frames = model.vision.image_size, settings["frames"]
    pixels_F3HW = torch.randn(frames, 3, size, size, device=device, dtype=dtype)

    def step():
        tokens_FTD = encode_frames(tower, projector, pixels_F3HW)
        if tokens_FTD.requires_grad:
            tokens_FTD.sum().backward()

    found = measure(step, settings["warmup"], settings["timed"])
    world = dist.get_world_size()
    flops = model_flops([], 0, pictures_of(model).units(frames, True), model, config.optim).total
    peak = accelerator.machine().peak_flops
    share = mfu(flops, found.seconds, 1, peak)
    return {
        "model": model.name,
        "variant": text,
        "part": "both" if variant["trainable"] else "forward",
        "gpus": world,
        "tp": 1,
        "ulysses": 1,
        "ring": 1,
        "frames": frames,
        "time_s": round(found.seconds, 6),
        "frames_per_s_per_gpu": round(frames / found.seconds, 1),
        "tflops_per_gpu": float(f"{flops / found.seconds / 1e12:.4g}"),
        "mfu": "" if share is None else round(share, 4),
        "peak_gib": round(found.peak_bytes / GIB, 3),
        "predicted_gib": round(tower_alone(config, frames, dtype.itemsize, accelerator.device_memory_bytes()) / GIB, 3),
        "hardware": hardware(world),
        "versions": versions(),
        "command": settings["command"],
    }


def config_of(settings: dict[str, Any], variant: dict[str, Any]) -> Config:
    """The configuration that is measured: ``config`` and ``overrides`` of ``settings``, and the parsed variant."""
    config = load_config(settings["config"], settings["overrides"])
    vision = config.model.vision
    vision.frame_micro_batch, vision.recompute = variant["frame_micro_batch"], bool(variant["recompute"])
    for part in (config.optim.vision, config.optim.projector):
        part.trainable = bool(variant["trainable"])
    return config

"""Stage 1 alone: frames per second of tower and projector on each GPU.

Settings: ``config``, ``overrides``, ``frames`` (of a rank).
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.predicted import tower_alone
from benchmarks.table import rates
from benchmarks.worker import measure, parse_variant
from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower, encode_frames
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.pictures import pictures_of

VARIANT = {"frame_micro_batch": 0, "trainable": 1, "recompute": 0}


def rows(settings: dict[str, Any], text: str) -> list[dict[str, Any]]:
    """That of the variant ``text``."""
    variant = parse_variant(text, VARIANT)
    config = config_of(settings, variant)
    model, device, dtype = config.model, accelerator.device(), accelerator.dtype_of("auto")
    tower = VisionTower(model.vision, model.init_std).to(device, dtype)
    projector = Projector(model.projector, model.vision, model.llm.hidden_size, model.init_std).to(device, dtype)
    tower.set_trainable(config.optim.vision.trainable)
    projector.requires_grad_(config.optim.projector.trainable)
    size, frames = model.vision.image_size, settings["frames"]
    pixels_F3HW = torch.randint(256, (frames, 3, size, size), dtype=torch.uint8, device=device)

    def step():
        tokens_FTD = encode_frames(tower, projector, pixels_F3HW)
        if tokens_FTD.requires_grad:
            tokens_FTD.sum().backward()

    found = measure(step, settings["warmup"], settings["timed"])
    flops = model_flops([], 0, pictures_of(model).units(frames, True), model, config.optim).total
    row = {
        "model": model.name,
        "part": "both" if variant["trainable"] else "forward",
        "tp": 1,
        "ulysses": 1,
        "ring": 1,
        "frames": frames,
        "frames_per_s_per_gpu": round(frames / found.seconds, 1),
        **rates(flops / found.seconds),
        **found.columns(tower_alone(config, frames, dtype.itemsize, accelerator.device_memory_bytes())),
    }
    return [row]


def config_of(settings: dict[str, Any], variant: dict[str, Any]) -> Config:
    """The configuration that is measured: ``config`` and ``overrides`` of ``settings``, and the parsed variant."""
    config = load_config(settings["config"], settings["overrides"])
    vision = config.model.vision
    vision.frame_micro_batch, vision.recompute = variant["frame_micro_batch"], bool(variant["recompute"])
    for part in (config.optim.vision, config.optim.projector):
        part.trainable = bool(variant["trainable"])
    return config

"""A small VILA with its tokenizer as a run leaves it, real videos, and the same question asked on any number of ranks."""

from __future__ import annotations

import re
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_vila import accelerator
from megatron_vila.checkpoint.resume import settings_of
from megatron_vila.checkpoint.save_load import save_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.data.synthetic import corpus, write_synthetic_set
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.errors import SettingError
from megatron_vila.generate import load
from megatron_vila.generate import loaded as loaded_module
from megatron_vila.generate.prompt import media_of
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.cache_memory import cache_memory
from tests.data.material import write_video

LONG = 24
"""Frames of ``long.mp4``."""


def make_files(folder: Path) -> None:
    """``tokenizer/``, ``videos/*.mp4``, ``images/*.png`` and ``long.mp4``."""
    train_tokenizer(corpus(), folder / "tokenizer", 512, fill=True)
    write_synthetic_set(folder, [8], 2, 0, images=True, size=28)
    write_video(folder / "long.mp4", LONG)


def settings(folder: Path) -> Config:
    config = load_config("tiny", ["model.llm.num_layers=2", "model.init_std=0.2"])
    config.data.tokenizer = str(folder / "tokenizer")
    config.data.workers, config.data.video_decoder = 1, "cpu"
    config.train.output = str(folder / "run")
    return config


def save_run(rank: int, folder: str, layout: tuple[int, int, int, int], lora: int = 0, name: str = "run") -> str:
    """Save the random weights of a model in ``layout`` as step 3 of a run; returns the checkpoint's folder."""
    config = settings(Path(folder))
    config.parallel, config.model.lora.rank = ParallelConfig(*layout), lora
    topology = ParallelTopology.create(config.parallel)
    model = VilaModel(config, topology, torch.float32, accelerator.device())
    if lora:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora" in key:
                    parameter.fill_(0.05)
    extra = {"settings": settings_of(config)}
    info = {"model": "tiny", "config": asdict(config)}
    return str(save_checkpoint(Path(folder) / name, 3, [model], extra=extra, info=info))


def answer(rank: int, folder: str, question: Any, loading: dict[str, Any], asking: dict[str, Any]) -> Any:
    """What a rank says to ``question``: (text, token ids, frames) of each answer, and what the decoder and the encoder did."""
    loaded = load(folder, **loading)
    try:
        tokens = asking.pop("max_new_tokens", 6)
        replies = loaded.ask(question, sampling=loaded.sampling(max_new_tokens=tokens), **asking)
        replies = replies if isinstance(replies, list) else [replies]
        said = [(reply.text, reply.token_ids.tolist(), reply.frames) for reply in replies]
        return said, (loaded.pictures.counts.encoded, loaded.topology.grid.world_size)
    finally:
        loaded.close()


def held_after_close(rank: int, folder: str) -> bool:
    """Whether a prefix that was taken up lives on when its model is closed."""
    loaded = load(folder)
    pictures = loaded.prompts.choose(media_of([], [str(Path(folder).parent / "long.mp4")]), 2)
    prefix, _ = loaded.read(loaded.prompts.document("Who?", pictures))
    assert prefix is not None
    loaded.hold(prefix)
    alive = weakref.ref(prefix)
    del prefix
    loaded.close()
    return alive() is not None


def refusal(rank: int, folder: str, question: Any, loading: dict[str, Any], asking: dict[str, Any]) -> tuple[str, str]:
    """The kind and text of the error that ``answer`` ends with."""
    try:
        answer(rank, folder, question, loading, asking)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was refused")


def in_little_memory(rank: int, folder: str, tokens: int) -> list[str]:
    """What is said of the long video on a machine with room for ``tokens`` tokens beside the model and its work: to all its
    frames, to as many as are said to fit, and to one more."""
    loaded = load(folder, chunk_tokens=16)
    memory = cache_memory(loaded.config, "auto", 16, 4, 0)
    room = accelerator.room_bytes
    accelerator.room_bytes = lambda: memory.work + loaded_module._MARGIN_BYTES + tokens * memory.per_token
    said = []
    try:
        frames = LONG
        for more in (0, 0, 1):
            try:
                pictures = loaded.prompts.choose(media_of([], [str(Path(folder).parent / "long.mp4")]), frames + more)
                loaded.read(loaded.prompts.document("Who?", pictures))
                said.append("")
            except SettingError as error:
                said.append(str(error))
                if found := re.search(r"--frames (\d+)", said[0]):
                    frames = int(found[1])
    finally:
        accelerator.room_bytes = room
        loaded.close()
    return said

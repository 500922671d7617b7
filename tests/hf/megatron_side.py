"""The Megatron side of the comparisons: one process builds a model, exports it, and says what the exported folder must give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_vila.checkpoint.save_load import save_checkpoint
from megatron_vila.config.schema import (
    Config,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    ParallelConfig,
    ProjectorConfig,
    VisionConfig,
)
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.models.vision.tower import encode_frames
from megatron_vila.plan.pictures import pictures_of
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, Document, pack, references
from tests.data.material import byte_level_tokenizer
from tests.parallel import contract
from tests.parallel.contract import build


@dataclass(frozen=True)
class Prompt:
    """What the processor made of one prompt: int64 token ids with MEDIA_TOKEN at visual places, float32 pixels [F, 3, P, P]."""

    token_ids: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Answer:
    """Logits [L, V] and projected pictures [F, T, H] of a prompt, and the tokens of its greedy continuation."""

    logits: np.ndarray
    features: np.ndarray
    tokens: list[int]


def config(
    folder: Path,
    image_size: int = 56,
    projector: str = "mlp_downsample",
    order: str = "row_major",
    tied: bool = False,
    bias: bool = True,
    init_std: float = 0.15,
    **data,
) -> Config:
    """A VILA of the true geometry at ``image_size`` and of tiny width; its tokenizer is saved in ``folder``.

    With a large ``init_std`` its answers vary; with the usual one its logits are of the size of one.
    """
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.save_pretrained(folder / "tokenizer")
    model = ModelConfig(
        name="test",
        vision=VisionConfig(
            hidden_size=8,
            num_layers=3,
            num_heads=2,
            ffn_hidden_size=12,
            image_size=image_size,
            use_head=not tied,
            frame_micro_batch=2,
        ),  # fmt: skip
        projector=ProjectorConfig(projector, order),
        llm=LanguageConfig(
            num_layers=2,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=None if bias else 8,
            ffn_hidden_size=24,
            vocab_size=len(tokenizer),
            qkv_bias=bias,
            tie_embeddings=tied,
            rope_theta=100.0,
            rope_scaling_factor=2.0 if bias else 1.0,
            max_positions=8192,
        ),  # fmt: skip
        init_std=init_std,
        attention="cpu",
    )
    settings = {"num_frames": 3, "frame_separator_ids": [198], "image_separator_ids": [198, 10]} | data
    return Config(model=model, data=DataConfig(tokenizer=str(folder / "tokenizer"), **settings))


def export(rank: int, settings: Config, folder: Path, layouts: tuple[str, ...]) -> None:
    """Save the model as a checkpoint of ``folder`` and export it to ``folder``/<layout>."""
    topology, model, _ = build(settings, ParallelConfig(), torch.float32)
    save_checkpoint(folder / "run", 0, [model], info={"config": dataclasses.asdict(settings)})
    for layout in layouts:
        export_checkpoint(folder / "run", folder / layout, layout=layout)
    topology.destroy()


def answer(rank: int, settings: Config, prompts: list[Prompt], new_tokens: int) -> list[Answer]:
    """What the model gives for ``prompts``; every new token is found by running the whole sequence again."""
    topology, model, _ = build(settings, ParallelConfig(), torch.float32)
    llm = settings.model.llm
    output = model.shared_embedding_or_output_weight() if llm.tie_embeddings else model.llm.output_layer.weight
    (unit,) = pictures_of(settings.model).units(1, True)

    def logits(token_ids: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        starts = np.flatnonzero(token_ids == MEDIA_TOKEN)[:: unit.tokens]
        frames = references("", range(len(starts)), True, [unit] * len(starts))
        document = Document(token_ids, np.full(len(token_ids), IGNORE), frames, starts, "prompt")
        shard = contract.shard_of(pack([document], 2, 2), topology, llm, torch.float32)
        hidden_s1H = model.hidden(shard, contract.made(model, pixels))
        return (hidden_s1H[: len(token_ids), 0] @ output.T)[:, : llm.vocab_size]

    answers = []
    with torch.no_grad():
        for prompt in prompts:
            pixels, token_ids, tokens = torch.from_numpy(prompt.pixels), prompt.token_ids, []
            first = logits(token_ids, pixels)
            for _ in range(new_tokens):
                last = logits(token_ids, pixels)[-1] if tokens else first[-1]
                tokens.append(int(last.argmax()))
                token_ids = np.append(token_ids, tokens[-1])
            features = encode_frames(model.vision, model.projector, pixels)
            answers.append(Answer(first.numpy(), features.numpy(), tokens))
    topology.destroy()
    return answers

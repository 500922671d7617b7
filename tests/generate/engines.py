"""An engine on each rank for tests, and what the single-process truth says of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.generate.engine import Engine, Request
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import Document
from tests import truth
from tests.parallel.contract import build, made
from tests.samples import pixels


class StandIns:
    """A ``PictureSource`` whose pixels are those of ``samples.pixels``."""

    def __init__(self, model: VilaModel) -> None:
        self._model = model
        self.started: set[int] = set()
        self.encoded: list[int] = []

    def start(self, number, plan) -> None:
        self.started.add(number)

    def tokens(self, number, plan) -> torch.Tensor:
        assert number in self.started
        self.encoded.append(number)
        with torch.no_grad():
            frames = [plan.row.frames[i] for i in plan.frames]
            return made(self._model, pixels(frames).to(self._model.config.params_dtype))


def engine(config: Config, parallel: ParallelConfig, dtype: torch.dtype, **settings) -> tuple[Engine, StandIns]:
    topology, model, _ = build(config, parallel, dtype)
    return Engine(model, topology, config, **settings), StandIns(model)


def requests(engine: Engine, pictures: StandIns, prompts: Sequence[Document]) -> list[Request]:
    found = []
    for prompt in prompts:
        beginning, tail = engine.split(prompt)
        found.append(
            Request(None if beginning is None else engine.prefill(beginning, pictures, prompt.sample_id), tail)
        )
    return found


def recorded(engine: Engine) -> list[np.ndarray]:
    """All logits that ``engine`` makes from here on, in a list that grows."""
    logits, seen = engine.runner.logits, []

    def record(hidden_nH):
        found = logits(hidden_nH)
        seen.append(found.double().numpy())
        return found

    engine.runner.logits = record
    return seen


def true_answers(
    rank: int, config: Config, prompts: Sequence[Document], tokens: int
) -> list[tuple[list[int], np.ndarray]]:
    """For each prompt its greedy continuation and the logits [tokens, V] that each was chosen from, by the plain model."""
    topology, model, _ = build(config, ParallelConfig())
    weights, found = dict(model.named_parameters()), []
    with torch.no_grad():
        for prompt in prompts:
            ids, rows = [], []
            visual = made(model, pixels(prompt.frames))
            for _ in range(tokens):
                longer = np.concatenate([prompt.token_ids, np.array(ids, np.int64)])
                document = Document(
                    longer, np.full(len(longer), -100), prompt.frames, prompt.frame_starts, prompt.sample_id
                )
                rows.append(truth.document_logits(weights, config.model, document, visual)[-1].numpy())
                ids.append(int(rows[-1].argmax()))
            found.append((ids, np.stack(rows)))
    topology.destroy()
    return found


def destroy(engine: Engine) -> None:
    ParallelTopology.destroy()

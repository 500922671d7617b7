"""The attention that frames get is that of a plain model that computes every weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.generate import frame_attention as module
from megatron_vila.generate.frame_attention import frame_attention
from megatron_vila.plan.row import Document
from tests import truth
from tests.generate.engines import destroy, engine, requests
from tests.parallel.contract import build, made
from tests.ranks import pool
from tests.samples import config, document, pixels

MODEL = config(layers=3, heads=12, kv_heads=6)
PROMPT = document("video", "ttFFtVFttFtFtttttttttttt")
ANSWER = np.array([7, 3, 11, 2, 5], np.int64)
LAYERS = (None, [1], [0, 2])


def _true_weights(rank: int) -> list[np.ndarray]:
    topology, model, _ = build(MODEL, ParallelConfig(), torch.float64)
    seen, plain = [], truth.attention

    def recording(q, k, v):
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[-1] ** -0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(future, -torch.inf).softmax(-1).mean(0).numpy())
        return plain(q, k, v)

    ids = np.append(PROMPT.token_ids, ANSWER)
    whole = Document(ids, np.full(len(ids), -100), PROMPT.frames, PROMPT.frame_starts, "whole")
    truth.attention = recording
    try:
        with torch.no_grad():
            truth.document_logits(
                dict(model.named_parameters()), MODEL.model, whole, made(model, pixels(PROMPT.frames))
            )
    finally:
        truth.attention = plain
    topology.destroy()
    wanted = slice(len(PROMPT) - 1, len(ids))
    places = [slice(s, s + f.tokens) for s, f in zip(PROMPT.frame_starts, PROMPT.frames, strict=True)]
    return [
        np.array([np.mean([seen[i][wanted, p].sum(-1) for i in layers or range(len(seen))]) for p in places])
        for layers in LAYERS
    ]


@pytest.fixture(scope="module")
def true_weights():
    return pool.run(1, _true_weights)[0]


def _measured(rank: int, parallel: ParallelConfig, settings: dict) -> list[np.ndarray]:
    module.BLOCK_SCORES = 7 * 12 * len(ANSWER)  # a few keys at a time
    made_engine, pictures = engine(MODEL, parallel, torch.float64, **settings)
    request = requests(made_engine, pictures, [PROMPT])[0]
    found = [frame_attention(made_engine, request.prefix, request.tail, ANSWER, layers) for layers in LAYERS]
    with pytest.raises(ValueError, match="layers \\[3\\] are not among 0 to 2"):
        frame_attention(made_engine, request.prefix, request.tail, ANSWER, [3])
    destroy(made_engine)
    return found


@pytest.mark.parametrize(
    ("layout", "chunk"),
    [({}, 0), ({"ulysses": 4}, 0), ({"ulysses": 2, "ring": 2}, 8), ({"tp": 2, "ring": 2}, 16)],
    ids=str,
)
def test_every_frame_has_the_attention_of_the_plain_model_in_every_layout(true_weights, layout, chunk):
    parallel = ParallelConfig(**layout)
    world = parallel.tp * parallel.ulysses * parallel.ring
    for found in pool.run(world, _measured, parallel, {"chunk_tokens": chunk}):
        for weights, wanted in zip(found, true_weights, strict=True):
            np.testing.assert_allclose(weights, wanted, rtol=1e-9)
            assert 0 < weights.sum() < 1


def test_an_fp8_cache_gives_nearly_the_same(true_weights):
    for weights, wanted in zip(
        pool.run(2, _measured, ParallelConfig(ring=2), {"cache_dtype": "fp8"})[0], true_weights, strict=True
    ):
        np.testing.assert_allclose(weights, wanted, rtol=0.1)

"""On a GPU, a decoded token (Triton kernel, CUDA graph, 16 bits) is as exact as the same token read as part of a chunk."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.generate import engine as engine_module
from megatron_vila.generate.engine import Request
from megatron_vila.generate.runner import Piece
from megatron_vila.generate.sampling import Sampling, choose
from megatron_vila.parallel.cache import Span
from megatron_vila.plan.row import IGNORE, Document
from tests import truth
from tests.generate.engines import destroy, engine
from tests.gpu import needs_a_gpu
from tests.ranks import pool
from tests.samples import VOCAB, config

NEW = 24


def _text(ids) -> Document:
    return Document(np.array(ids, np.int64), np.full(len(ids), IGNORE), (), np.empty(0, np.int64), "text")


class _NoPictures:
    def __init__(self, made) -> None:
        self._nothing = torch.empty(0, 256, dtype=made.runner.dtype, device=made.device)

    def start(self, number, plan) -> None: ...

    def tokens(self, number, plan) -> torch.Tensor:
        return self._nothing


def _relative(found, wanted) -> float:
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())


def errors(rank: int, cache: str, tokens: int) -> tuple[float, float]:
    """Largest errors of the logits of ``NEW`` tokens, relative to the largest logit: decoded, and read as one chunk."""
    small = config(layers=3)
    llm = replace(
        small.model.llm, hidden_size=256, num_heads=14, head_dim=128, ffn_hidden_size=384, max_positions=2 * tokens
    )
    case = replace(small, model=replace(small.model, llm=llm, init_std=0.05, attention="auto"))
    made, _ = engine(case, ParallelConfig(), torch.bfloat16, cache_dtype=cache, chunk_tokens=512)
    decoded = []

    def record(logits_BV, *others):
        decoded.append(logits_BV[0].clone())
        return choose(logits_BV, *others)

    ids = np.random.default_rng(5).integers(VOCAB, size=tokens)
    prefix = made.prefill(_text(ids[:-3]), _NoPictures(made), "text")
    with patch.object(engine_module, "choose", record):
        (answer,) = made.answer([Request(prefix, ids[-3:])], Sampling(max_new_tokens=NEW))
    whole = _text([*ids, *answer.token_ids[:-1]])
    span = Span.empty(made.span_shape, len(whole), torch.bfloat16, made.device)
    hidden = made.runner.read(made.runner.plan([Piece(whole, 0, (span,), span)]))[tokens - 1 : len(whole), 0]
    chunk = made.runner.logits(hidden)
    weights = {name: weight.detach().double().cpu() for name, weight in made.runner.model.named_parameters()}
    wanted = truth.document_logits(weights, case.model, whole, torch.empty(0, 256, dtype=torch.float64))[tokens - 1 :]
    destroy(made)
    assert len(decoded) == len(wanted) == NEW
    return _relative(torch.stack(decoded), wanted), _relative(chunk, wanted)


@needs_a_gpu
@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_decoded_logits_are_as_exact_as_those_of_a_chunk(cache):
    ((decoded, chunk),) = pool.run(1, errors, cache, 3000)
    print(f"{cache}: decoded {decoded:.2e}, chunk {chunk:.2e}")
    assert decoded < {"bf16": 1.5, "fp8": 6.0}[cache] * chunk

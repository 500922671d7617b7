"""Chunked prefill, the cache and decoding against the single-process truth, in every layout."""

import numpy as np
import pytest
import torch

from megatron_vila.config.schema import ParallelConfig
from megatron_vila.errors import SettingError
from megatron_vila.generate.engine import Request, Sampling
from tests.generate.engines import destroy, engine, recorded, requests, true_answers
from tests.ranks import pool
from tests.samples import config, document

PROMPTS = (
    document("video", "ttFFFtFFtFVttTttt"),
    document("text", "ttttt"),
    document("other", "FFtttttttttttt"),
)
NEW, FEW = 64, 5
"""Tokens of an answer where layouts are compared, and where something else is."""
MODELS = {"grouped": config(layers=2), "uneven": config(layers=2, heads=12, kv_heads=6, tied=True)}
"""``uneven`` heads are not cut by groups where ulysses is 4."""


@pytest.fixture(scope="module")
def truth():
    """What one process answers, for each model."""
    return {name: pool.run(1, true_answers, model, PROMPTS, NEW)[0] for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def short(truth):
    """The beginnings of these answers."""
    return {name: [(ids[:FEW], logits[:FEW]) for ids, logits in answers] for name, answers in truth.items()}


def _answers(rank, model, parallel, dtype, settings, new):
    made, pictures = engine(MODELS[model], parallel, dtype, **settings)
    seen = recorded(made)
    answers = made.answer(requests(made, pictures, PROMPTS), Sampling(max_new_tokens=new))
    destroy(made)
    return [answer.token_ids.tolist() for answer in answers], np.stack(seen, 1)


@pytest.mark.parametrize(
    ("model", "layout", "dtype", "chunk"),
    [
        ("grouped", {}, torch.float64, 0),
        ("grouped", {}, torch.float32, 8),
        ("uneven", {"ulysses": 4}, torch.float64, 8),
        ("grouped", {"ring": 2}, torch.float64, 0),
        ("uneven", {"ulysses": 2, "ring": 2}, torch.float32, 16),
        ("grouped", {"ring": 4}, torch.float64, 8),
        ("grouped", {"tp": 2}, torch.float64, 5),
        ("grouped", {"tp": 2, "ring": 2}, torch.float64, 0),
        ("grouped", {"ulysses": 4, "ring": 2}, torch.float64, 8),
        ("grouped", {"tp": 2, "ulysses": 2, "ring": 2}, torch.float32, 8),
    ],
    ids=str,
)
def test_answers_are_those_of_one_process(truth, model, layout, dtype, chunk):
    parallel = ParallelConfig(**layout)
    world = parallel.tp * parallel.ulysses * parallel.ring
    found = pool.run(world, _answers, model, parallel, dtype, {"chunk_tokens": chunk}, NEW)
    error = 1e-10 if dtype == torch.float64 else 1e-5
    for tokens, logits in found:
        for row, (ids, wanted) in enumerate(truth[model]):
            assert tokens[row] == ids
            np.testing.assert_allclose(logits[row], wanted, rtol=0, atol=error * np.abs(wanted).max())


def _one_by_one(rank, parallel):
    """Prompts asked alone, one after the other; one of them twice; and the second half of an answer asked as a tail."""
    made, pictures = engine(MODELS["grouped"], parallel, torch.float64, chunk_tokens=8)
    asked = requests(made, pictures, PROMPTS)
    alone = [made.answer([request], Sampling(max_new_tokens=FEW))[0].token_ids.tolist() for request in asked]
    chunks = len(pictures.encoded)
    again = requests(made, pictures, PROMPTS[:1])[0]
    assert again.prefix is asked[0].prefix and len(pictures.encoded) == chunks, "what somebody holds is not read again"
    forced = made.predictions([Request(r.prefix, np.append(r.tail, ids)) for r, ids in zip(asked, alone, strict=True)])
    destroy(made)
    return alone, [ids[-FEW - 1 :].tolist() for ids in forced]


@pytest.mark.parametrize("layout", [{}, {"ulysses": 2, "ring": 2}], ids=str)
def test_prompts_alone_and_forced_answers_give_the_same_tokens(short, layout):
    parallel = ParallelConfig(**layout)
    for alone, forced in pool.run(parallel.ulysses * parallel.ring, _one_by_one, parallel):
        assert alone == [ids for ids, _ in short["grouped"]]
        assert [ids[:-1] for ids in forced] == alone


def _instead(rank, parallel):
    """A prompt read instead of others: one that begins alike, one that does not, one that is too short, one that goes on."""
    made, pictures = engine(MODELS["grouped"], parallel, torch.float64, chunk_tokens=8)
    seen, (beginning, tail), found = recorded(made), made.split(PROMPTS[0]), []
    for before in ("ttFFFtFFtFFFFFFFF", "tttttFFFFFFFFFtFF", "FFt", "ttFFFtFFtFVttTFF"):
        given_up, heard = made.prefill(made.split(document("video", before))[0], pictures, "given up"), []

        def hear(*at, heard=heard):
            heard.append(at)

        taken = made.prefill(beginning, pictures, "taken", hear, instead_of=given_up)
        seen.clear()
        made.answer([Request(taken, tail)], Sampling(max_new_tokens=FEW))
        found.append((np.concatenate(seen), taken.span is given_up.span, len(heard), heard[-1:]))
        del taken, given_up
    destroy(made)
    return found


@pytest.mark.parametrize("layout", [{}, {"ulysses": 2, "ring": 2}], ids=str)
def test_a_prompt_read_instead_of_another_takes_its_memory_and_its_beginning(short, layout):
    parallel, wanted = ParallelConfig(**layout), short["grouped"][0][1]
    for found in pool.run(parallel.ulysses * parallel.ring, _instead, parallel):
        for logits, *_ in found:
            np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())
        assert [same for _, same, *_ in found] == [True, True, False, True]
        # Four of eight chunks are those of the first one; what is not read counts as progress too.
        assert [chunks for *_, chunks, _ in found] == [4, 8, 8, 0]
        assert [last for *_, last in found] == [[(50, 9, 50)]] * 3 + [[]]


def _with_stop(rank, parallel, stop):
    made, pictures = engine(MODELS["grouped"], parallel, torch.float64)
    heard = []
    answers = made.answer(
        requests(made, pictures, PROMPTS),
        Sampling(max_new_tokens=FEW, stop_ids=(stop,)),
        on_token=lambda row, token: heard.append((row, token)),
    )
    destroy(made)
    return [(answer.token_ids.tolist(), answer.stopped_by) for answer in answers], heard


def test_an_answer_ends_at_a_stop_token_while_others_go_on(short):
    wanted = [ids for ids, _ in short["grouped"]]
    stop = wanted[0][2]
    for answers, heard in pool.run(2, _with_stop, ParallelConfig(ring=2), stop):
        for row, (ids, why) in enumerate(answers):
            full = wanted[row]
            assert ids == (full[: full.index(stop)] if stop in full else full)
            assert why == ("stop" if stop in full else "length")
            assert [token for other, token in heard if other == row] == ids


def _drawn(rank, parallel, sampling, cache):
    made, pictures = engine(MODELS["grouped"], parallel, torch.float32, cache_dtype=cache)
    answers = made.answer(requests(made, pictures, PROMPTS), sampling)
    destroy(made)
    return [answer.token_ids.tolist() for answer in answers]


def test_drawn_tokens_are_the_same_on_all_ranks_and_follow_from_the_seed():
    drawn = [
        pool.run(
            4, _drawn, ParallelConfig(ulysses=2, ring=2), Sampling(max_new_tokens=8, temperature=2.0, seed=seed), "auto"
        )
        for seed in (0, 0, 1)
    ]
    assert all(ranks.count(ranks[0]) == 4 for ranks in drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def _of_another_mind(rank, parallel):
    """Ranks but the first prefer what the first one likes least."""
    made, pictures = engine(MODELS["grouped"], parallel, torch.float64)
    asked, logits = requests(made, pictures, PROMPTS), made.runner.logits
    made.runner.logits = lambda hidden_nH: logits(hidden_nH) * (1 if rank == 0 else -1)
    answers = made.answer(asked, Sampling(max_new_tokens=FEW))
    destroy(made)
    return [answer.token_ids.tolist() for answer in answers]


def test_all_ranks_go_on_with_the_tokens_that_the_first_rank_chose(short):
    for tokens in pool.run(2, _of_another_mind, ParallelConfig(ring=2)):
        assert tokens == [ids for ids, _ in short["grouped"]]


def _fp8(rank, parallel):
    made, pictures = engine(MODELS["grouped"], parallel, torch.float32, cache_dtype="fp8", chunk_tokens=8)
    seen = recorded(made)
    made.answer(requests(made, pictures, PROMPTS), Sampling(max_new_tokens=2))
    destroy(made)
    return np.stack(seen, 1)


@pytest.mark.parametrize("layout", [{}, {"ring": 2}], ids=str)
def test_an_fp8_cache_is_near_the_truth(short, layout):
    """e4m3 has a relative rounding error of at most 1/16; scores and values carry it into logits."""
    parallel = ParallelConfig(**layout)
    for logits in pool.run(parallel.ring, _fp8, parallel):
        for row, (_, wanted) in enumerate(short["grouped"]):
            error = np.abs(logits[row][0] - wanted[0]).max() / np.abs(wanted[0]).max()
            assert 0 < error < 0.05


def _refused(rank, parallel):
    with pytest.raises(SettingError, match="one pipeline stage and one replica; use parallel.pp=1"):
        engine(MODELS["grouped"], parallel, torch.float64)
    destroy(None)


def test_pipeline_stages_and_replicas_are_refused():
    pool.run(2, _refused, ParallelConfig(pp=2))
    pool.run(2, _refused, ParallelConfig())


def _no_question(rank):
    made, pictures = engine(MODELS["grouped"], ParallelConfig(), torch.float64)
    (request,) = requests(made, pictures, [document("bare", "ttF")])
    with pytest.raises(SettingError, match="at least one token after the last frame"):
        made.answer([request], Sampling())
    destroy(made)


def test_a_prompt_that_ends_with_its_video_is_refused():
    pool.run(1, _no_question)

"""Room for the cache of inference: bytes of a token in every layout, and what is said of a video that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.errors import SettingError
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.cache_memory import (
    FP8_BLOCK_TOKENS,
    CacheMemory,
    Wanted,
    cache_memory,
    cache_problem,
    frames_that_fit,
    kv_heads_of_a_rank,
    layout_for,
    token_bytes,
)
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.layouts import layout_problems
from megatron_vila.plan.pictures import pictures_of


def longvila() -> Config:
    return load_config("models/longvila-7b")


def test_a_token_of_longvila_7b_takes_56_kib_in_bf16_and_half_of_it_with_the_scales_in_fp8():
    llm, alone = longvila().model.llm, Layout(1, 1, 1, 1)
    assert token_bytes(llm, alone, "bf16", 2) == token_bytes(llm, alone, "auto", 2) == 2 * 28 * 4 * 128 * 2 == 56 * 1024
    assert token_bytes(llm, alone, "fp8", 2) == 2 * 28 * 4 * (128 + 4)


def test_fp8_is_read_in_blocks_so_its_work_does_not_grow_with_the_tokens():
    exact, small = (cache_memory(longvila(), kind, 8192, 2, 140 * GIB) for kind in ("bf16", "fp8"))
    assert small.per_token == token_bytes(longvila().model.llm, Layout(1, 1, 1, 1), "fp8", 2)
    block = 2 * FP8_BLOCK_TOKENS * 4 * 128
    assert small.work - exact.work == block * (2 + 4 + 4)
    # 4,194,304 tokens took 132.0 GiB of an H200.
    assert 132 * GIB < small.weights + small.work + small.slack + small.cache(2**22) < 136 * GIB


def test_ulysses_and_tensor_ranks_share_the_heads_of_a_token_until_each_has_one():
    llm = longvila().model.llm
    layouts = [(1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1)]
    assert [kv_heads_of_a_rank(llm, Layout(*layout)) for layout in layouts] == [4, 2, 1, 1]
    # Seven ranks have four query heads each, which lie in two groups of seven on some.
    assert kv_heads_of_a_rank(llm, Layout(1, 1, 7, 1)) == 2


def test_ring_ranks_share_the_tokens():
    memory = CacheMemory(weights=0, work=0, slack=0, per_token=10, ring=4)
    assert memory.cache(8) == 20 and memory.cache(9) == 30
    assert memory.tokens_in(29) == 8 and memory.tokens_in(-5) == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (1, 1, 2, 4), (2, 1, 2, 1)])
def test_what_is_said_to_fit_fits_and_one_frame_more_does_not(layout, dtype):
    config = longvila()
    config.parallel.tp, config.parallel.pp, config.parallel.ulysses, config.parallel.ring = layout
    memory, room, text = cache_memory(config, dtype, 16384, 2, 140 * GIB), 10 * GIB, 37
    frames = frames_that_fit(config, memory.tokens_in(room), text, 1)
    each = pictures_of(config.model).units(1, True)[0].tokens + 1
    assert memory.cache(text + frames * each) <= room < memory.cache(text + (frames + 1) * each + memory.ring)


def test_6000_frames_of_longvila_7b_fit_an_h200_and_its_weights_and_work_are_counted():
    config = longvila()
    memory = cache_memory(config, "bf16", 16384, 2, 140 * GIB)
    assert 15 * GIB < memory.weights < 18 * GIB and 1 * GIB < memory.work < 12 * GIB
    assert memory.cache(6000 * 197) == pytest.approx(63 * GIB, rel=0.02)
    assert memory.tokens_on(139 * GIB) > 6000 * 197
    assert memory.tokens_on(60 * GIB) < 6000 * 197


def test_a_video_that_does_not_fit_is_told_how_many_frames_would_and_what_else_to_do():
    config, memory = longvila(), CacheMemory(0, 0, 0, per_token=56 * 1024, ring=1)
    wanted = Wanted(tokens=6000 * 197 + 4000, text_tokens=4000, frames=6000, separators=1)
    problem = cache_problem(config, wanted, memory, 40 * GIB, [replace(memory, per_token=30 * 1024)])
    fits = frames_that_fit(config, memory.tokens_in(40 * GIB), 4000, 1)
    assert "6,000 frames (1,186,000 tokens) need 63.3 GiB" in problem and "40 GiB are free" in problem
    assert f"{fits:,} frames would fit" in problem and f"--frames {fits}" in problem
    assert "--cache fp8 (" in problem and "--ring 2" in problem
    assert not cache_problem(config, wanted, memory, 64 * GIB)


def test_without_room_for_a_single_token_no_number_of_frames_is_proposed():
    wanted = Wanted(tokens=1000, text_tokens=10, frames=5, separators=1)
    problem = cache_problem(longvila(), wanted, CacheMemory(0, 0, 0, per_token=1024, ring=1), 0)
    assert "0 frames would fit: use more GPUs (--tp)" in problem and "--frames" not in problem
    text = cache_problem(longvila(), Wanted(1000, 1000, 0, 0), CacheMemory(0, 0, 0, per_token=1024, ring=1), 10 * 1024)
    assert "these 1,000 tokens of question and answer need" in text and "10 tokens would fit" in text


def test_an_answer_that_does_not_fit_is_to_be_shorter_whatever_the_frames():
    memory = CacheMemory(0, 0, 0, per_token=1024, ring=1)
    for frames in (0, 5):
        wanted = Wanted(tokens=10**6 + frames * 197, text_tokens=10**6, frames=frames, separators=1)
        problem = cache_problem(longvila(), wanted, memory, 2000 * 1024, [replace(memory, per_token=512)])
        assert "1,000,000 tokens of question and answer need" in problem and "2,000 tokens would fit" in problem
        assert "--max-new-tokens" in problem and "frames" not in problem and "fp8" not in problem


def test_a_layout_that_nobody_chose_fits_the_model_on_every_number_of_ranks():
    llm = longvila().model.llm
    for ranks in range(1, 17):
        layout = layout_for(llm, ranks)
        assert layout.size == ranks and not layout_problems(llm, layout)
    assert layout_for(llm, 8) == Layout(1, 1, 4, 2)


def test_sizes_that_are_chosen_are_kept_and_the_others_follow():
    llm = longvila().model.llm
    assert layout_for(llm, 8, tp=2) == Layout(2, 1, 2, 2)
    assert layout_for(llm, 8, ulysses=2) == Layout(1, 1, 2, 4)
    assert layout_for(llm, 8, ring=8) == Layout(1, 1, 1, 8)
    assert layout_for(llm, 14, ring=2) == Layout(1, 1, 7, 2)
    assert layout_for(llm, 4, tp=2, ulysses=1, ring=2) == Layout(2, 1, 1, 2)


def test_more_or_fewer_processes_than_one_replica_and_layouts_that_the_model_does_not_allow_are_refused_with_others():
    llm = longvila().model.llm
    told = r"4 processes are not tp\*ulysses\*ring = 1\*2\*1 = 2.*\(dp=1\): start 2.*ulysses=4 ring=1"
    with pytest.raises(SettingError, match=told):
        layout_for(llm, 4, ulysses=2, ring=1)
    with pytest.raises(SettingError, match=r"1 processes.*start 3"):
        layout_for(llm, 1, ring=3)
    with pytest.raises(SettingError, match="parallel.tp=8 does not divide"):
        layout_for(llm, 8, tp=8)
    with pytest.raises(SettingError, match="ulysses=-1"):
        layout_for(llm, 8, ulysses=-1)

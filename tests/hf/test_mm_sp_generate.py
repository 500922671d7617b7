"""``generate`` under MM-SP: what one process says, said by all ranks that share the prompt and its cache."""

from __future__ import annotations

import copy
import string
import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megatron_vila.hf.mm_sp import generate as generation
from megatron_vila.hf.mm_sp.adapters.llava_onevision import LlavaOnevision
from megatron_vila.hf.mm_sp.arguments import Settings, check_generate
from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from tests.hf.mm_sp_cases import PER_FRAME, SIDE, VIDEO, VOCAB, build, text_sample, video_sample
from tests.hf.mm_sp_ranks import shard
from tests.ranks import pool

NEW = 16
GREEDY = {
    "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
LETTERS = string.printable[:VOCAB]
UNEVEN = 9
"""Tokens of a chunk: no multiple of what a row is padded to, and cut at frames for a video."""


def of_ids(ids_1L: torch.Tensor) -> dict:
    return {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}


def text(seed: int, length: int) -> dict:
    return of_ids(text_sample(seed, length)["input_ids"][None])


def video(seed: int, layout: list[int]) -> dict:
    sample = video_sample(seed, layout)
    return of_ids(sample["input_ids"][None]) | {"pixel_values_videos": torch.stack(sample["pixel_values_videos"])}


PROMPTS = {
    "llama": text(1, 23),
    "qwen2": text(2, 30),
    "qwen3": text(3, 17),
    "llava_onevision": video(4, [-5, 3, -2, 3, -7]),
}


def built(name: str, **sizes) -> PreTrainedModel:
    return build(name, **sizes).eval()


def stock(name: str, prompt: dict, **how) -> dict:
    """Tokens and logits of one process without MM-SP."""
    model = built(name, **how.pop("sizes", {}))
    torch.manual_seed(how.pop("seed", 0))
    out = model.generate(**prompt, **GREEDY | how)
    return {"text": out.sequences[0, prompt["input_ids"].shape[1] :].tolist(), "logits": torch.cat(out.logits)}


def new_tokens(model: PreTrainedModel, prompt: dict, **how) -> list[int]:
    out = model.generate(**prompt, **GREEDY | how).sequences
    return out[0, prompt["input_ids"].shape[1] :].tolist()


def against_stock(rank: int, ulysses: int, ring: int, wanted: dict[str, dict], sizes: dict) -> dict[str, tuple]:
    found = {}
    for name, want in wanted.items():
        model = built(name, **sizes)
        enable_mm_sp(model, ulysses, ring)
        prompt = PROMPTS[name]
        out = model.generate(**prompt, **GREEDY, prefill_chunk_size=UNEVEN)
        text = out.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        error = (torch.cat(out.logits) - want["logits"]).abs().max().item()
        found[name] = text == want["text"], error, out.past_key_values.nbytes
    return found


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict]:
    return {name: stock(name, prompt) for name, prompt in PROMPTS.items()}


@pytest.mark.parametrize("ulysses, ring", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_text_and_logits_are_those_of_one_process_after_uneven_chunks_and_16_tokens(ulysses, ring, wanted):
    cases = {name: wanted[name] for name in (PROMPTS if ring == ulysses == 2 else ("qwen2", "llava_onevision"))}
    ranks = pool.run(ulysses * ring, against_stock, ulysses, ring, cases, {})
    for found in ranks:
        for same_text, error, _ in found.values():
            assert same_text and error < 1e-5
    # 45 tokens (the last one is not read), 2 layers, keys and values, 2 heads of 4 numbers of 4 bytes: each kept once.
    assert sum(found["qwen2"][2] for found in ranks) == 45 * 2 * 2 * 2 * 4 * 4


@pytest.mark.parametrize("ulysses, sizes", [(2, {"kv_heads": 1}), (3, {"heads": 6, "kv_heads": 2})])
def test_key_value_heads_that_do_not_divide_over_ulysses_are_kept_where_they_are_needed(ulysses, sizes):
    wanted = {"qwen3": stock("qwen3", PROMPTS["qwen3"], sizes=sizes)}
    for found in pool.run(ulysses, against_stock, ulysses, 1, wanted, sizes):
        assert found["qwen3"][0] and found["qwen3"][1] < 1e-5


def sampled(rank: int, how: dict) -> tuple[list[int], float]:
    model = built("qwen2")
    enable_mm_sp(model, ring=2)
    torch.manual_seed(5 + rank)
    return new_tokens(model, PROMPTS["qwen2"], **how), torch.rand(()).item()


def test_samples_are_those_of_one_process_with_the_seed_of_the_first_rank():
    how = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    want = stock("qwen2", PROMPTS["qwen2"], seed=5, **how)["text"]
    (first, drawn), (second, drawn_there) = pool.run(2, sampled, how)
    assert first == second == want
    assert drawn != drawn_there
    torch.manual_seed(6)
    assert drawn_there == torch.rand(()).item()  # as if nothing had been drawn


class _Noise(LogitsProcessor):
    """Adds what differs between ranks."""

    def __init__(self, rank: int) -> None:
        self._numbers = torch.Generator().manual_seed(rank)

    def __call__(self, input_ids, scores):
        return scores + 3 * torch.randn(scores.shape, generator=self._numbers)


class _StopAfter(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((1,), input_ids.shape[1] >= self._tokens)


class _Streamer:
    def __init__(self) -> None:
        self.got: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        self.got += ids.flatten().tolist()

    def end(self) -> None:
        self.got.append(-1)


def tokenizer() -> PreTrainedTokenizerFast:
    """Each token is a letter."""
    whole = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=LETTERS[0]))
    whole.pre_tokenizer, whole.decoder = Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=whole)


def with_parts_of_the_user(rank: int) -> dict:
    model, prompt = built("qwen2"), PROMPTS["qwen2"]
    enable_mm_sp(model, ulysses=2)
    streamer, streaming = _Streamer(), {}
    if rank == 0:
        streaming = {"streamer": streamer}
    found = {"streamed": (new_tokens(model, prompt, **streaming), streamer.got)}
    found["noise"] = new_tokens(model, prompt, logits_processor=LogitsProcessorList([_Noise(rank)]))
    # 30 tokens of prompt: the first rank stops after 4, the other one would after 9.
    found["stop"] = new_tokens(model, prompt, stopping_criteria=StoppingCriteriaList([_StopAfter(34 + 5 * rank)]))
    found["most"] = new_tokens(model, prompt, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(33)]))
    # Only on the first rank the time is over at once.
    time.sleep(0.3 * (1 - rank))
    found["time"] = new_tokens(model, prompt, max_time=1000.0 * rank)
    stop = "".join(LETTERS[token] for token in found["streamed"][0][1:3])
    found["string"] = new_tokens(model, prompt, stop_strings=[stop], tokenizer=tokenizer())
    eos = found["streamed"][0][6]
    found["eos"] = new_tokens(model, prompt, eos_token_id=eos)
    return found


def test_streamers_processors_and_criteria_of_the_user_work_and_the_first_rank_decides(wanted):
    want = wanted["qwen2"]["text"]
    first, second = pool.run(2, with_parts_of_the_user)
    assert first["streamed"] == (want, [*PROMPTS["qwen2"]["input_ids"][0].tolist(), *want, -1])
    assert second["streamed"] == (want, [])
    assert first["noise"] == second["noise"] != want
    assert first["stop"] == second["stop"] == want[:4]
    assert first["most"] == second["most"] == want[:3]
    assert first["time"] == second["time"] == want[:1]
    assert first["string"] == second["string"] == want[:3]
    assert first["eos"] == second["eos"] == want[: want.index(want[6]) + 1]


def count_read(model: nn.Module) -> list[int]:
    """Tokens of each call of the model from now on, padding included."""
    read: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return read


def several_questions(rank: int, questions: list[list[int]]) -> dict:
    model, context = built("llama"), PROMPTS["llama"]["input_ids"]
    mm_sp = enable_mm_sp(model, ulysses=1, ring=2)
    prompts = [of_ids(torch.cat([context, torch.tensor([question])], 1)) for question in questions]
    fresh = [new_tokens(model, prompt) for prompt in prompts]
    cache = mm_sp.cache()
    new_tokens(model, prompts[0], past_key_values=cache)
    copied = copy.deepcopy(cache)
    read = count_read(model)
    with_cache = [new_tokens(model, prompt, past_key_values=cache) for prompt in prompts]
    cost = sum(read)
    with_copy = new_tokens(model, prompts[1], past_key_values=copied)
    # A dialogue: the answer and a further question follow what the cache holds.
    longer = torch.cat([prompts[1]["input_ids"], torch.tensor([with_copy + questions[0]])], 1)
    going_on = new_tokens(model, of_ids(longer), past_key_values=copied)
    copied.crop(-3)
    return {
        "fresh": fresh, "with_cache": with_cache, "cost": cost, "with_copy": with_copy, "going_on": going_on,
        "fresh_going_on": new_tokens(model, of_ids(longer)), "left": copied.get_seq_length(),
        "kept": sum(span.length for span in copied.spans), "whole": longer.shape[1] + NEW - 1,
    }  # fmt: skip


def test_several_questions_read_what_they_share_once():
    questions = [[3, 4], [5, 6, 7, 8], [9]]
    ranks = pool.run(2, several_questions, questions)
    for found in ranks:
        assert found["with_cache"] == found["fresh"]
        assert found["with_copy"] == found["fresh"][1]
        assert found["going_on"] == found["fresh_going_on"]
        assert found["left"] == found["whole"] - 3
        # The 23 shared tokens are not read again: chunks of up to 4 tokens here, and the decoded ones.
        assert found["cost"] <= 3 * (NEW + 2)
    assert sum(found["kept"] for found in ranks) == ranks[0]["left"]


def in_fp8(rank: int) -> tuple[float, int, int]:
    model, prompt = built("qwen2"), PROMPTS["qwen2"]
    mm_sp = enable_mm_sp(model, ring=2)
    exact, small = mm_sp.cache(), mm_sp.cache("fp8")
    want = model.generate(**prompt, **GREEDY, past_key_values=exact, prefill_chunk_size=UNEVEN)
    got = model.generate(**prompt, **GREEDY, past_key_values=small, prefill_chunk_size=UNEVEN)
    return (got.logits[0] - want.logits[0]).abs().max().item(), exact.nbytes, small.nbytes


def test_a_cache_in_fp8_is_smaller_and_close():
    for error, exact, small in pool.run(2, in_fp8):
        assert 0 < error < 0.2
        assert small == exact // 2  # 4 numbers and a scale take 8 bytes here instead of 16


class _Watched:
    """A video that remembers which of its frames were asked for; ``broken`` ones cannot be read."""

    def __init__(self, frames: torch.Tensor, broken: range = range(0)) -> None:
        self._frames, self._broken, self.asked = frames, broken, []

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, part: slice) -> torch.Tensor:
        mine = range(part.start, part.stop)
        if set(mine) & set(self._broken):
            raise OSError(f"frame {mine.start} cannot be read")
        self.asked += mine
        return self._frames[part]


def of_lazy_videos(rank: int, layout: list[int], more: list[int]) -> dict:
    """``more`` is a second turn with a video of its own."""
    model = built("llava_onevision")
    mm_sp = enable_mm_sp(model, ring=2)
    one, two = video_sample(4, layout), video_sample(5, more)
    videos = [_Watched(frames) for frames in one["pixel_values_videos"]]
    ids, cache = one["input_ids"][None], mm_sp.cache()
    how = {"prefill_chunk_size": UNEVEN, "past_key_values": cache}
    first = new_tokens(model, of_ids(ids) | {"pixel_values_videos": videos}, **how)
    longer = torch.cat([ids, torch.tensor([first]), two["input_ids"][None]], 1)
    second = new_tokens(model, of_ids(longer) | {"pixel_values_videos": two["pixel_values_videos"]}, **how)
    everything = one["pixel_values_videos"] + two["pixel_values_videos"]
    fresh = new_tokens(model, of_ids(longer) | {"pixel_values_videos": everything})
    asked = [(number, frame) for number, video in enumerate(videos) for frame in video.asked]
    return {"first": first, "asked": asked, "second": second, "fresh": fresh}


def test_frames_are_read_once_and_on_one_rank_each(wanted):
    ranks = pool.run(2, of_lazy_videos, [-5, 3, -2, 3, -7], [-3, 4, -2])
    for found in ranks:
        assert found["first"] == wanted["llava_onevision"]["text"]
        assert found["second"] == found["fresh"]
    assert sorted(ranks[0]["asked"] + ranks[1]["asked"]) == [(video, frame) for video in range(2) for frame in range(3)]
    assert all(found["asked"] for found in ranks)


def with_a_broken_frame(rank: int) -> tuple[str, list[int]]:
    model, sample = built("llava_onevision"), video_sample(4, [-5, 3, -7])
    enable_mm_sp(model, ring=2)
    frames = sample["pixel_values_videos"][0]
    prompt = of_ids(sample["input_ids"][None]) | {"pixel_values_videos": [_Watched(frames, range(1, 2))]}
    try:
        new_tokens(model, prompt)
        message = ""
    except (ValueError, OSError) as error:
        message = str(error)
    return message, new_tokens(model, prompt | {"pixel_values_videos": [frames]})


def test_a_frame_that_one_rank_cannot_read_ends_the_call_on_all():
    want = stock("llava_onevision", video(4, [-5, 3, -7]))["text"]
    for message, text in pool.run(2, with_a_broken_frame):
        assert "cannot be read" in message
        assert text == want


def of_replicas(rank: int, name: str, prompts: list[dict], weights: str) -> list[int]:
    model = built(name)
    if weights == "fsdp":
        shard(model)
    mm_sp = enable_mm_sp(model, ulysses=2)
    return new_tokens(model, prompts[mm_sp.dp_rank], prefill_chunk_size=8, max_new_tokens=4 + 3 * mm_sp.dp_rank)


@pytest.mark.parametrize("name, weights", [("llama", "fsdp"), ("llava_onevision", "plain")])
def test_replicas_answer_their_own_prompts_of_different_lengths(name, weights):
    prompts = [text(1, 21), text(2, 5)] if name == "llama" else [video(1, [-2, 4, -3]), text(2, 5)]
    results = pool.run(4, of_replicas, name, prompts, weights)
    wanted = [stock(name, prompt, max_new_tokens=4 + 3 * number)["text"] for number, prompt in enumerate(prompts)]
    assert results == [wanted[0]] * 2 + [wanted[1]] * 2


def beyond_its_room(rank: int, prompt: dict, room: int) -> tuple[list[int], int]:
    model = built("qwen2")
    mm_sp = enable_mm_sp(model, ring=2)
    cache, before = mm_sp.cache(), generation._MOST_AHEAD
    generation._MOST_AHEAD = room
    try:
        return new_tokens(model, prompt, past_key_values=cache), len(cache.spans)
    finally:
        generation._MOST_AHEAD = before


def test_an_answer_may_take_more_room_than_was_made_for_it_and_a_prompt_one_token():
    prompt = text(1, 1)
    want = stock("qwen2", prompt)["text"]
    for found, spans in pool.run(2, beyond_its_room, prompt, 4):
        assert found == want
        assert spans == 4  # two tokens each on this rank


def in_bfloat16(rank: int) -> tuple[list[int], torch.dtype]:
    model, prompt = built("llava_onevision"), PROMPTS["llava_onevision"]
    shard(model, policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    mm_sp = enable_mm_sp(model, ulysses=2)
    cache = mm_sp.cache()
    return new_tokens(model, prompt, past_key_values=cache), cache.spans[0].k.dtype


def test_weights_that_fsdp2_shards_may_compute_in_bfloat16():
    (first, dtype), (second, _) = pool.run(2, in_bfloat16)
    assert first == second and len(first) == NEW
    assert dtype == torch.bfloat16


def around_training(rank: int) -> tuple[float, list[int], list[int]]:
    model = build("qwen2")
    model.gradient_checkpointing_enable()
    mm_sp = enable_mm_sp(model, ring=2)
    batch = mm_sp.collator()([text_sample(1, 13)])
    before = model(**batch).loss.item()
    while_on = new_tokens(model, PROMPTS["qwen2"])
    change = model(**batch).loss.item() - before
    with mm_sp.paused():
        paused = new_tokens(model.eval(), PROMPTS["qwen2"])
    return change, while_on, paused


def test_a_model_in_training_with_recomputation_generates_and_trains_on(wanted):
    for change, while_on, paused in pool.run(2, around_training):
        assert change == 0
        assert while_on == paused == wanted["qwen2"]["text"]


def after_a_failure(rank: int) -> list[int]:
    """A forward pass fails on all ranks in the last layer, for a chunk and for a decoded token."""
    model = built("qwen2")
    mm_sp = enable_mm_sp(model, ulysses=1, ring=2)
    cache = mm_sp.cache()
    for call in (1, 6):
        calls = []

        def fail(module, args, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                raise RuntimeError("failed")

        hook = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            new_tokens(model, PROMPTS["qwen2"], past_key_values=cache, prefill_chunk_size=UNEVEN)
        hook.remove()
    return new_tokens(model, PROMPTS["qwen2"], past_key_values=cache)


def test_a_cache_can_be_used_after_a_call_that_failed(wanted):
    assert pool.run(2, after_a_failure) == [wanted["qwen2"]["text"]] * 2


def refused_on_all(rank: int, first: dict, others: dict[str, dict]) -> dict[str, str]:
    model = built("qwen2")
    enable_mm_sp(model, ulysses=2)
    found = {}
    for name, other in others.items():
        with pytest.raises(ValueError) as error:
            model.generate(**(first | other if rank else first))
        found[name] = str(error.value)
    return found


def test_what_only_one_rank_asks_for_is_refused_on_all():
    others = {
        "input_ids: not the same on the 2 ranks": {"input_ids": text(9, 30)["input_ids"]},
        "max_new_tokens: not the same on the 2 ranks": {"max_new_tokens": 7},
        "generation_config: not the same": {"generation_config": GenerationConfig(top_k=3)},
        "num_beams=3 (only greedy search and sampling run here": {"num_beams": 3},
    }
    for found in pool.run(2, refused_on_all, PROMPTS["qwen2"] | {"max_new_tokens": 3}, others):
        assert all(message in said for message, said in found.items())


def check(given: dict, own: GenerationConfig | None = None, config: GenerationConfig | None = None, tokens=None) -> str:
    call = {"input_ids": torch.tensor([[1, 2, 3]])} | given
    try:
        check_generate(call, Settings(own or GenerationConfig(), config, call), tokens)
    except ValueError as error:
        return str(error)
    return ""


TOKENS = LlavaOnevision(VIDEO, PER_FRAME, 1, SIDE)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "num_beams=4 (only greedy search and sampling run here; set num_beams=1)"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 (one prompt gets one answer"),
        ({"use_cache": False}, "use_cache=False (each token would read the whole prompt again; set use_cache=True)"),
        ({"cache_implementation": "static"}, "cache_implementation=static (the cache is that of mm_sp.cache()"),
        ({"past_key_values": DynamicCache()}, "past_key_values of DynamicCache (each rank keeps its part"),
        ({"assistant_model": object()}, "assistant_model (assisted decoding takes tokens back"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 (assisted decoding"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 (it runs the model on a second prompt"),
        ({"output_attentions": True}, "output_attentions=True (no attention weights are formed"),
        ({"inputs_embeds": torch.zeros(1, 3, 4)}, "inputs_embeds (give input_ids)"),
        ({"pixel_values_videos": torch.zeros(1)}, "pixel_values_videos (the model takes text only"),
        ({"max_new_token": 5}, "max_new_token (no argument of generate"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0 (use 1 or more tokens)"),
        ({"input_ids": None}, "a call without input_ids"),
        ({"input_ids": torch.ones(3, 2, dtype=torch.int64)}, "input_ids of 3 prompts (all ranks share one"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "input_ids of shape (1, 0)"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "an attention_mask with zeros (take the padding out"),
        ({"attention_mask": torch.ones(1, 9)}, "an attention_mask of shape (1, 9) for input_ids of shape (1, 3)"),
        ({"pad_token_id": 2}, "input_ids with padding, token 2"),
    ],
)
def test_what_generate_cannot_do_is_refused_with_its_cure(given, message):
    assert message in check(given)


def test_settings_of_the_configurations_are_refused_too():
    beams = GenerationConfig(num_beams=2)
    assert "num_beams=2" in check({}, own=beams)
    assert "num_beams=2" in check({}, config=beams)
    assert check({"num_beams": 1}, own=beams) == ""


def test_everything_that_is_refused_is_said_at_once():
    found = check({"num_beams": 2, "use_cache": False, "inputs_embeds": 1})
    assert all(part in found for part in ("num_beams=2", "use_cache=False", "inputs_embeds", "mm_sp.paused()"))


@pytest.mark.parametrize("given", [{}, {"pad_token_id": 2, "eos_token_id": 2}, {"temperature": 0.5, "do_sample": True}])
def test_what_generate_can_do_is_not_refused(given):
    assert check(given) == ""


def test_a_prompt_that_ends_with_a_video_is_refused():
    assert "put the question after it" in check({"input_ids": torch.tensor([[1, VIDEO]])}, tokens=TOKENS)


def videos_that_do_not_fit(rank: int) -> dict[str, str]:
    model, sample = built("llava_onevision"), video_sample(4, [-5, 3, -7])
    mm_sp = enable_mm_sp(model, ring=1)
    prompt, frames, cache = of_ids(sample["input_ids"][None]), sample["pixel_values_videos"][0], mm_sp.cache()
    found = {}
    for case, videos in (("none", None), ("shorter", [frames[:2]])):
        with pytest.raises(ValueError) as error:
            new_tokens(model, prompt | {"pixel_values_videos": videos})
        found[case] = str(error.value)
    new_tokens(model, prompt | {"pixel_values_videos": [frames]}, past_key_values=cache)
    with pytest.raises(ValueError) as error:
        new_tokens(model, prompt | {"pixel_values_videos": [frames]}, past_key_values=cache)
    found["again"] = str(error.value)
    return found


def test_videos_that_do_not_fit_the_prompt_or_are_in_the_cache_are_refused():
    found = pool.run(1, videos_that_do_not_fit)[0]
    assert "has 13 video tokens (id 65) but videos of no frames need 0" in found["none"]
    assert "has 13 video tokens (id 65) but videos of 2 frames need 9" in found["shorter"]
    assert "after the 24 tokens in the cache" in found["again"]

"""Language models beyond Llama and plain Qwen under MM-SP: what each does differently is as in one process, or refused.

Sliding windows, soft caps on logits, scaled embeddings and scores, partial and local rotary embeddings, experts.
With MEGATRON_VILA_TEST_ALL=1 each model runs in each layout, in float32 too.
"""

from __future__ import annotations

import os

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from megatron_vila.hf.mm_sp.arguments import Settings, check_generate
from megatron_vila.hf.mm_sp.checks import check_call, check_model
from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from megatron_vila.hf.mm_sp.language_attention import ATTENTION
from tests.hf.mm_sp_cases import VOCAB, build, in_float64, text_sample
from tests.hf.mm_sp_language_cases import LANGUAGE
from tests.hf.mm_sp_ranks import Case, largest_errors
from tests.ranks import pool

TEXTS = [text_sample(1, 29), text_sample(2, 1), text_sample(3, 18, slice(9, 16)), text_sample(4, 7)]
ALL = os.environ.get("MEGATRON_VILA_TEST_ALL") == "1"
LAYOUTS = [(2, 1), (1, 2), (2, 2)] if ALL else [(2, 2)]
FLOAT32_INSIDE = ("gemma2", "qwen3_moe")
"""Stock code of these rounds to float32 in a model of float64 too: softmax of eager attention, and of the router."""


def errors(cases: list[Case]) -> dict[str, dict[str, float]]:
    """``largest_errors`` by model."""
    return {case.name: found for case, found in zip(cases, largest_errors(cases), strict=True)}


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float64(ulysses, ring):
    for name, found in errors([Case(name, ulysses, ring, [[TEXTS]], double=True) for name in LANGUAGE]).items():
        print(f"{name} ulysses={ulysses} ring={ring}: worst in float64 {max(found.values()):.1e}")
        assert max(found.values()) < (1e-6 if name in FLOAT32_INSIDE else 1e-12), (name, found)


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float32(ulysses, ring):
    names = LANGUAGE if ALL else ("gemma3", "qwen3_moe")
    for name, found in errors([Case(name, ulysses, ring, [[TEXTS]]) for name in names]).items():
        print(f"{name} ulysses={ulysses} ring={ring}: loss {found['loss']:.1e}, all gradients {found['all']:.1e}")
        assert found["loss"] < 1e-6 and found["all"] < 1e-6, (name, found)
        assert max(found.values()) < 3e-6, (name, found)


@pytest.mark.parametrize("window", [2, 27] if ALL else [27])
def test_very_short_and_long_windows_have_the_gradients_of_one_process(window):
    found = errors([Case("mistral", 1, 4, [[TEXTS]], double=True, model={"sliding_window": window})])
    assert max(found["mistral"].values()) < 1e-12, found


def local_logits(rank: int, name: str, samples: list[dict]) -> float:
    """How far the logits of this rank's tokens are from those of one process."""
    model = in_float64(build(name)).eval()
    whole = [model(input_ids=sample["input_ids"][None]).logits[0] for sample in samples]
    batch = enable_mm_sp(model, ulysses=1, ring=2).collator()(
        [{"input_ids": sample["input_ids"]} for sample in samples]
    )
    row, mine = batch["mm_sp_row"], model(**batch).logits[0]
    documents = (row.cu_seqlens[None] <= row.positions[:, None]).sum(1) - 1
    tokens = row.positions - row.cu_seqlens[documents]
    pairs = [(slot, d, t) for slot, (d, t) in enumerate(zip(documents, tokens, strict=True)) if t < len(whole[d])]
    return max((mine[slot] - whole[d][t]).abs().max().item() for slot, d, t in pairs)


def test_logits_are_capped_where_there_are_no_labels():
    assert max(pool.run(2, local_logits, "gemma3", TEXTS)) < 1e-12


def after_a_failure(rank: int) -> float | None:
    model = build("gemma3")
    mm_sp = enable_mm_sp(model)
    batch = mm_sp.collator()(TEXTS)
    model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    return model.config.final_logit_softcapping


def test_a_call_that_fails_leaves_the_soft_cap_in_the_configuration():
    assert pool.run(1, after_a_failure) == [2.5]


NEW = 12
PROMPT = text_sample(5, 21)["input_ids"][None]
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | {
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
FITS = {"sliding_window": PROMPT.shape[1] + NEW - 1}
SETTINGS = {
    "mistral": FITS, "gemma2": FITS, "gemma3": FITS, "qwen2_window": FITS,
    # Phi-3 would throw its cache away at the 28th token.
    "phi3": FITS | {"original_max_position_embeddings": 27},
}  # fmt: skip


def generated(name: str) -> tuple[PreTrainedModel, dict]:
    model = build(name, **SETTINGS.get(name, {})).eval()
    return model, {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)} | GREEDY


def against_stock(rank: int, ulysses: int, ring: int, wanted: dict[str, tuple]) -> dict[str, tuple]:
    found = {}
    for name, (ids, logits) in wanted.items():
        model, call = generated(name)
        enable_mm_sp(model, ulysses, ring)
        out = model.generate(**call, prefill_chunk_size=9)
        found[name] = out.sequences.tolist() == ids, (torch.cat(out.logits) - logits).abs().max().item()
        assert getattr(model.config, "original_max_position_embeddings", 27) == 27
    return found


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
def test_text_and_logits_are_those_of_one_process(ulysses, ring):
    wanted = {}
    for name in LANGUAGE:
        model, call = generated(name)
        out = model.generate(**call)
        wanted[name] = out.sequences.tolist(), torch.cat(out.logits)
    for found in pool.run(ulysses * ring, against_stock, ulysses, ring, wanted):
        assert all(same_text and error < 1e-5 for same_text, error in found.values()), found


@pytest.mark.parametrize("tokens, refused", [(PROMPT.shape[1], False), (PROMPT.shape[1] + 1, True)])
def test_an_answer_beyond_the_window_is_refused_before_it_is_begun(tokens, refused):
    call = {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "max_new_tokens": NEW}
    message = ""
    try:
        check_generate(call, Settings(GenerationConfig(), None, call), None, FITS["sliding_window"])
    except ValueError as error:
        message = str(error)
    assert ("a sequence of 33 tokens in a model with sliding_window=32" in message) == refused


def beyond_the_window(rank: int) -> list[str]:
    """What ``generate`` says, and what a model says that is called by hand with a cache."""
    model = build("mistral", sliding_window=8).eval()
    mm_sp = enable_mm_sp(model, ring=2)
    said = []
    with pytest.raises(ValueError) as error:
        model.generate(PROMPT, max_new_tokens=2, pad_token_id=None)
    said.append(str(error.value))
    cache = mm_sp.cache()
    model.generate(PROMPT[:, :7], max_new_tokens=2, eos_token_id=None, past_key_values=cache)
    with pytest.raises(ValueError) as error:
        model(input_ids=PROMPT[:, :1], past_key_values=cache)
    return [*said, str(error.value)]


def test_a_cache_never_attends_beyond_the_window():
    for from_generate, from_call in pool.run(2, beyond_the_window):
        assert "a sequence of 22 tokens in a model with sliding_window=8" in from_generate
        assert "sliding_window=8 is shorter than a sequence of 9 tokens" in from_call


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "rope_type=dynamic takes its angles from the longest position",
        ),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope_type=longrope takes its angles from the longest position",
        ),
        ("qwen3_moe", {"output_router_logits": True}, "output_router_logits=True adds a balance loss"),
        ("mistral", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; set attention_dropout=0.0"),
        ("glm4", {"num_attention_heads": 3, "num_key_value_heads": 1}, "ulysses=2 does not divide 3 query heads"),
    ],
)  # fmt: skip
def test_settings_that_would_give_wrong_gradients_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError) as error:
        check_model(build(name, **settings), 2, ATTENTION)
    assert message in str(error.value)


def test_an_output_layer_with_a_bias_is_refused():
    model = build("olmo2")
    model.lm_head = torch.nn.Linear(16, VOCAB, bias=True)
    with pytest.raises(ValueError, match="has no output layer without bias"):
        check_model(model, 1, ATTENTION)


def test_router_logits_asked_for_in_a_call_are_refused():
    with pytest.raises(ValueError, match="output_router_logits .each rank would balance its own tokens only"):
        check_call((), {"mm_sp_row": 1, "output_router_logits": True}, int)

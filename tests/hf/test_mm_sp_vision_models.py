"""InternVL, LLaVA-NeXT-Video, SmolVLM2, VideoLLaMA 3 and VILA under MM-SP: pictures and videos of different sizes, and text.

With MEGATRON_VILA_TEST_ALL=1 each model runs in each layout, in float32 and with single samples too.
"""

from __future__ import annotations

import os

import pytest
import torch

from megatron_vila.hf.mm_sp.adapters import adapter_of
from megatron_vila.hf.mm_sp.checks import check_model
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from megatron_vila.hf.mm_sp.language_attention import ATTENTION
from megatron_vila.plan.grid import GridShape
from tests.hf.mm_sp_cases import in_float64, relative_errors
from tests.hf.mm_sp_ranks import gradients, shard
from tests.hf.mm_sp_vision_cases import (
    IMAGE,
    MODELS,
    SAMPLES,
    VIDEO,
    build_vision,
    internvl,
    of_one_prompt,
    vision_truth,
)
from tests.ranks import pool

ALL = os.environ.get("MEGATRON_VILA_TEST_ALL") == "1"
LAYOUTS = [(2, 1), (1, 2), (2, 2)] if ALL else [(2, 2)]
by_hand = pytest.mark.skipif(not ALL, reason="by hand, with MEGATRON_VILA_TEST_ALL=1")
FLOAT32_INSIDE = ("internvl_moe", "video_llama_3")
"""Stock code of these rounds to float32 in a model of float64 too: the router of Qwen3-MoE, the rotary embedding of the tower."""
PLAIN = {"double": True, "weights": "plain", "recompute": False}


def train_each(rank: int, layout: tuple[int, int], cases: list[tuple], how: dict) -> list[dict[str, float]]:
    """For each model the relative errors of its loss and gradients. ``cases`` give a name, samples for each replica, the loss and
    the gradients of one process."""
    found = []
    for name, replicas, wanted_loss, wanted in cases:
        model = in_float64(build_vision(name)) if how["double"] else build_vision(name)
        if how["recompute"]:
            model.gradient_checkpointing_enable()
        mm_sp = enable_mm_sp(model, *layout, frame_micro_batch=3)
        if how["weights"] == "fsdp":
            shard(model)
        loss = model(**mm_sp.collator()(replicas[mm_sp.dp_rank])).loss
        loss.backward()
        errors = relative_errors(gradients(model, how["weights"]), wanted)
        found.append({"loss": abs(loss.item() - wanted_loss) / wanted_loss} | errors)
    return found


def errors(layout: tuple[int, int], replicas: dict[str, list[list[dict]]], **how) -> dict[str, dict[str, float]]:
    """By model, the largest relative errors over the ranks; ``replicas`` are the samples for each replica."""
    how = PLAIN | how
    cases = []
    for name, own in replicas.items():
        model = in_float64(build_vision(name)) if how["double"] else build_vision(name)
        cases.append((name, own, *vision_truth(model, [sample for samples in own for sample in samples])))
    world = layout[0] * layout[1] * len(cases[0][1])
    found = zip(replicas, zip(*pool.run(world, train_each, layout, cases, how), strict=True), strict=True)
    return {name: {key: max(one[key] for one in ranks) for key in ranks[0]} for name, ranks in found}


def assert_exact(found: dict[str, dict[str, float]]) -> None:
    for name, one in found.items():
        print(f"{name}: worst in float64 {max(one.values()):.1e}")
        assert max(one.values()) < (1e-6 if name in FLOAT32_INSIDE else 1e-12), (name, one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float64(layout):
    assert_exact(errors(layout, {name: [SAMPLES[name]] for name in MODELS}))


@by_hand
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float32(layout):
    for name, found in errors(layout, {name: [SAMPLES[name]] for name in MODELS}, double=False).items():
        print(f"{name} {layout}: loss {found['loss']:.1e}, all gradients {found['all']:.1e}, worst {max(found.values()):.1e}")
        assert found["loss"] < 1e-6 and found["all"] < 1e-6, (name, found)


def test_replicas_with_pictures_alone_videos_alone_and_text_alone_train_under_fsdp2():
    mine = {name: [[SAMPLES[name][number]] for number in (2, 3, 1)] for name in MODELS}
    assert_exact(errors((1, 1), mine, weights="fsdp", recompute=True))


@by_hand
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_text_and_a_row_of_one_sample_have_the_gradients_of_one_process(layout):
    assert_exact(errors(layout, {name: [SAMPLES[name][1:2]] for name in MODELS}))
    assert_exact(errors(layout, {name: [SAMPLES[name][:1]] for name in MODELS}))


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}


def generated(name: str) -> tuple:
    model = build_vision(name).eval()
    text = model.config.get_text_config()
    if name == "llava_next_video":
        text.sliding_window = None
    ids = SAMPLES[name][0]["input_ids"][None]
    return model, of_one_prompt(SAMPLES[name][0]) | {"attention_mask": torch.ones_like(ids)} | GREEDY


def against_stock(rank: int, layout: tuple[int, int], wanted: dict[str, tuple]) -> dict[str, tuple]:
    found = {}
    for name, (ids, logits) in wanted.items():
        model, call = generated(name)
        enable_mm_sp(model, *layout)
        out = model.generate(**call, prefill_chunk_size=9)
        found[name] = out.sequences.tolist() == ids, (torch.cat(out.logits) - logits).abs().max().item()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_about_pictures_and_videos_are_those_of_one_process(layout):
    wanted = {}
    for name in MODELS:
        model, call = generated(name)
        out = model.generate(**call)
        wanted[name] = out.sequences.tolist(), torch.cat(out.logits)
    for found in pool.run(layout[0] * layout[1], against_stock, layout, wanted):
        assert all(same_text and error < 1e-5 for same_text, error in found.values()), found


def changed(name: str, number: int, **fields) -> dict:
    """A sample with other fields; without those that are None."""
    return {key: value for key, value in (SAMPLES[name][number] | fields).items() if value is not None}


def without_a_visual_token(name: str, number: int, token: int) -> dict:
    sample = SAMPLES[name][number]
    kept = torch.ones(len(sample["input_ids"]), dtype=torch.bool)
    kept[(sample["input_ids"] == token).nonzero()[0]] = False
    return sample | {key: sample[key][kept] for key in ("input_ids", "labels")}


def with_text_inside(name: str, number: int, token: int) -> dict:
    sample = SAMPLES[name][number]
    place = int((sample["input_ids"] == token).nonzero()[1])
    parts = {key: (sample[key][:place], torch.tensor([5]), sample[key][place:]) for key in ("input_ids", "labels")}
    return sample | {key: torch.cat(part) for key, part in parts.items()}


GRAY = SAMPLES["smolvlm"][0]["pixel_values"].clone()
GRAY[0, 2] = 0
HOLE = SAMPLES["smolvlm"][0]["pixel_attention_mask"].clone()
HOLE[0, 1, 3, 3] = 0


@pytest.mark.parametrize(
    "name, sample, message",
    [
        ("internvl", without_a_visual_token("internvl", 0, IMAGE), "has 31 visual tokens (id 65) but 8 tiles of 4 tokens need"),
        ("internvl", with_text_inside("internvl", 0, IMAGE), "of which number 0 has text between them; put no text there"),
        ("internvl", changed("internvl", 0, pixel_values=None), "has 32 visual tokens (id 65) but 0 tiles of 4 tokens need 0"),
        ("internvl", changed("internvl", 0, pixel_values=torch.zeros(8, 3, 8, 8)), "frames have shape (8, 3, 8, 8)"),
        ("llava_next_video", without_a_visual_token("llava_next_video", 3, VIDEO), "but videos of 5 frames need 20"),
        ("llava_next_video", changed("llava_next_video", 2, image_sizes=None), "has 2 pictures in pixel_values but 0"),
        (
            "llava_next_video",
            changed("llava_next_video", 2, image_sizes=torch.tensor([[10, 32], [32, 32]])),
            "has 90 picture tokens (id 65) but 2 pictures of these image_sizes need 122",
        ),
        ("smolvlm", changed("smolvlm", 0, pixel_values=GRAY), "a tile of pixel_values is all zeros"),
        ("smolvlm", changed("smolvlm", 0, pixel_attention_mask=HOLE), "keeps no upper left part of a tile"),
        ("video_llama_3", changed("video_llama_3", 0, video_merge_sizes=None), "has 1 video_grid_thw but 0 video_merge_sizes"),
        ("video_llama_3", changed("video_llama_3", 0, image_grid_thw=torch.tensor([[1, 3, 4]])), "has 15 rows in pixel_values"),
        (
            "video_llama_3",
            changed("video_llama_3", 0, video_compression_mask=torch.ones(17, dtype=torch.bool)),
            "has a video_compression_mask of 17 tokens, but its videos have 18",
        ),
        ("video_llama_3", changed("video_llama_3", 0, video_compression_mask=None), "need 18"),
        ("video_llama_3", changed("video_llama_3", 0, pixel_values=torch.zeros(15, 49)), "patches have shape (15, 49) but"),
        ("vila", changed("vila", 0, pixel_values=SAMPLES["vila"][0]["pixel_values"][:-1]), "but 7 pictures of 4 tokens need 28"),
        ("vila", changed("vila", 0, pixel_values_videos=torch.zeros(1)), "has pixel_values_videos, which MM-SP cannot shard"),
    ],
)
def test_samples_that_do_not_fit_the_model_are_refused(name, sample, message):
    collate = ShardCollator(GridShape.of(1), 0, adapter_of(build_vision(name).config))
    with pytest.raises(ValueError) as error:
        collate([sample])
    assert message in str(error.value)


def test_settings_and_language_models_that_were_not_compared_are_refused():
    with pytest.raises(ValueError, match="text_config.model_type=gemma2 is not supported; use qwen2, qwen3, qwen3_moe"):
        check_model(internvl(model_type="gemma2", attn_logit_softcapping=None), 1, ATTENTION)
    model = build_vision("llava_next_video")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="vision_feature_select_strategy=full leaves the token of the class"):
        check_model(model, 1, ATTENTION)

"""Loss and gradients of stock Transformers models under MM-SP equal those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.hf.mm_sp_cases import VIDEO, build, in_float64, relative_errors, text_sample, truth, video_sample
from tests.hf.mm_sp_ranks import Case, gradients, make, train, untouched
from tests.ranks import pool

LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
MODELS = ["llama", "qwen2", "qwen3", "llava_onevision"]
TEXTS = [text_sample(1, 29), text_sample(2, 1), text_sample(3, 18, slice(9, 16)), text_sample(4, 7)]
VIDEOS = [video_sample(1, [-3, 5, -6, 1, -4]), text_sample(2, 9), video_sample(3, [2, -9])]
MORE_VIDEOS = [text_sample(5, 4), video_sample(6, [-2, 3, -5])]


def errors(case: Case) -> dict[str, float]:
    """The largest relative errors over the ranks: of the loss, of each gradient and of ``all`` together."""
    model = build(case.name, **case.model)
    if case.double:
        model = in_float64(model)
    loss, grads = truth(model, [sample for step in case.steps for replica in step for sample in replica])
    world = case.ulysses * case.ring * len(case.steps[0])
    results = pool.run(world, train, case, loss, grads)
    return {name: max(result[name] for result in results) for name in results[0]}


def assert_exact(case: Case) -> None:
    found = errors(case)
    assert max(found.values()) < 1e-12, sorted(found.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float64(name, ulysses, ring):
    assert_exact(Case(name, ulysses, ring, [[VIDEOS if name == "llava_onevision" else TEXTS]], double=True))


@pytest.mark.parametrize("ulysses, ring", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_samples_have_the_loss_and_gradients_of_one_process_in_float32(name, ulysses, ring):
    found = errors(Case(name, ulysses, ring, [[VIDEOS if name == "llava_onevision" else TEXTS]]))
    assert found["loss"] < 1e-6
    assert found["all"] < 1e-6
    # One process in float32 is itself up to 1.4e-6 away from float64 in the tensors with the smallest gradients.
    assert max(found.values()) < 3e-6, found


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_one_sample_alone_has_the_gradients_of_one_process(name, ulysses, ring):
    assert_exact(Case(name, ulysses, ring, [[[(VIDEOS if name == "llava_onevision" else TEXTS)[0]]]], double=True))


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (12, 3), (12, 6)])
def test_key_value_heads_fewer_than_ulysses_or_cut_inside_a_group_keep_their_gradients(heads, kv_heads):
    model = {"heads": heads, "kv_heads": kv_heads}
    assert_exact(Case("qwen3", 4, 1, [[TEXTS]], double=True, model=model))


@pytest.mark.parametrize("weights", ["plain", "ddp", "fsdp", "fsdp_whole"])
@pytest.mark.parametrize("name", ["qwen2", "llava_onevision"])
def test_weights_may_be_sharded_by_fsdp2_or_copied_by_ddp(name, weights):
    samples = VIDEOS if name == "llava_onevision" else TEXTS
    assert_exact(Case(name, 2, 1, [[samples]], double=True, weights=weights))


@pytest.mark.parametrize("weights", ["ddp", "fsdp"])
@pytest.mark.parametrize("tied", [False, True])
def test_data_parallel_replicas_and_micro_batches_share_one_mean(weights, tied):
    steps = [[TEXTS[:1], TEXTS[1:3]], [TEXTS[3:], TEXTS[:2]], [TEXTS[2:], TEXTS[1:]]]
    assert_exact(Case("llama", 2, 1, steps, double=True, weights=weights, model={"tied": tied}))


@pytest.mark.parametrize("weights", ["plain", "fsdp"])
def test_replicas_with_different_numbers_of_frames_encode_in_step(weights):
    steps = [[VIDEOS, [text_sample(8, 11)]], [[text_sample(9, 5)], MORE_VIDEOS]]
    assert_exact(Case("llava_onevision", 1, 2, steps, double=True, weights=weights, frame_micro_batch=2))


@pytest.mark.parametrize("name", ["qwen3", "llava_onevision"])
@pytest.mark.parametrize("weights", ["plain", "fsdp", "fsdp_whole"])
def test_recomputed_layers_and_frames_give_the_same_gradients(name, weights):
    samples = VIDEOS if name == "llava_onevision" else TEXTS
    assert_exact(Case(name, 2, 1, [[samples]], double=True, weights=weights, recompute=True, frame_micro_batch=2))


def with_dropout_in_the_tower(rank: int, weights: str) -> tuple[float, float]:
    """How far gradients with recomputed frames are from those with kept ones, and those with another seed."""
    grads = []
    for recompute, seed in ((False, 1), (True, 1), (True, 2)):
        case = Case("llava_onevision", 2, 1, [], double=True, weights=weights, recompute=recompute, frame_micro_batch=2)
        model, mm_sp = make(case)
        for layer in model.model.vision_tower.encoder.layers:
            layer.self_attn.dropout = 0.5
        torch.manual_seed(seed + rank)
        model(**mm_sp.collator()(VIDEOS)).loss.backward()
        grads.append(gradients(model, weights))
    kept, again, other = grads
    return relative_errors(again, kept)["all"], relative_errors(other, kept)["all"]


@pytest.mark.parametrize("weights", ["plain", "fsdp"])
def test_recomputed_frames_have_the_dropout_of_the_first_time(weights):
    for recomputed, with_another_seed in pool.run(2, with_dropout_in_the_tower, weights):
        assert recomputed < 1e-12
        assert with_another_seed > 1e-3


@pytest.mark.parametrize("weights", ["plain", "fsdp"])
def test_fewer_frames_than_ranks_leave_exact_gradients(weights):
    samples = [video_sample(4, [-3, 1, -6]), text_sample(5, 5)]
    assert_exact(Case("llava_onevision", 2, 2, [[samples]], double=True, weights=weights))


@pytest.mark.parametrize("weights", ["plain", "fsdp"])
def test_a_text_only_row_gives_tower_and_projector_exact_zeros(weights):
    found = errors(Case("llava_onevision", 1, 2, [[[text_sample(5, 9)]]], double=True, weights=weights))
    assert found.pop("all") < 1e-12
    assert found["model.vision_tower.embeddings.patch_embedding.weight"] == 0
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("ulysses, ring", [(2, 1), (1, 2)])
def test_a_text_only_row_touches_the_weights_that_a_video_touches(ulysses, ring):
    text, video = (
        pool.run(2, untouched, Case("llava_onevision", ulysses, ring, [[samples]]))
        for samples in ([text_sample(5, 9)], [video_sample(1, [-3, 2, -4])])
    )
    assert text == video
    # The model does not use the last norm of its tower.
    assert text[0] == {f"model.vision_tower.post_layernorm.{part}" for part in ("weight", "bias")}


def test_labels_that_all_lie_on_one_rank_give_every_rank_the_loss():
    # 16 tokens over 4 ranks: chunks of two, and tokens 6 and 7 predict on the last rank only.
    assert_exact(Case("qwen2", 1, 4, [[[text_sample(6, 16, slice(7, 9))]]], double=True))


def test_a_step_without_labels_has_loss_zero_and_gradients_zero():
    found = errors(Case("qwen2", 2, 1, [[[text_sample(6, 16, slice(0, 0))]]], double=True))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_taken_out(side):
    def pad(sample: dict) -> dict:
        ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
        parts = {"input_ids": (ids, [0] * 5), "labels": (labels, [3] * 5), "attention_mask": ([1] * len(ids), [0] * 5)}
        return {key: right + left if side == "right" else left + right for key, (right, left) in parts.items()}

    wanted_loss, wanted = truth(in_float64(build("qwen2")), TEXTS)
    case = Case("qwen2", 2, 1, [[[pad(sample) for sample in TEXTS]]], double=True)
    for result in pool.run(2, train, case, wanted_loss, wanted):
        assert max(result.values()) < 1e-12


def test_the_samples_hold_what_the_tests_speak_of():
    assert any((sample["input_ids"] == VIDEO).any() for sample in VIDEOS)
    assert sum(len(video) for sample in VIDEOS for video in sample.get("pixel_values_videos", [])) == 8

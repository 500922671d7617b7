"""Qwen-VL under MM-SP: pictures and videos of any size beside each other and beside text, as in one process.

With MEGATRON_VILA_TEST_ALL=1 each model runs in each layout with each row.
"""

from __future__ import annotations

import os
import pickle
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megatron_vila import accelerator
from megatron_vila.hf.mm_sp.adapters import ADAPTERS, adapter_of
from megatron_vila.hf.mm_sp.checks import check_model
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from megatron_vila.hf.mm_sp.language_attention import ATTENTION
from megatron_vila.plan.grid import GridShape
from tests.hf.mm_sp_cases import build, in_float64, relative_errors, text_sample, truth
from tests.hf.mm_sp_qwen_cases import IMAGE, NAMES, VIDEO, config, qwen_sample, stock_inputs
from tests.hf.mm_sp_ranks import Case, gradients, largest_errors, make, untouched
from tests.ranks import pool

ALL = os.environ.get("MEGATRON_VILA_TEST_ALL") == "1"
LAYOUTS = [(2, 1), (1, 2), (2, 2)]

ROWS: dict[str, list[list[int | tuple[int, ...]]]] = {
    "pictures, videos and text": [[3, (4, 6), 5, (3, 4, 4), 4], [7], [(2, 2), 2, (2, 6, 4), 3, (1, 2, 4), (4, 2), 6]],
    "one sample": [[2, (3, 4, 2), 4, (6, 8), 3]],
    "one picture, fewer units than ranks": [[5, (4, 4), 7], [4]],
    "a long video that one rank owns": [[1, (5, 6, 6), 2], [23]],
    "text": [[9], [4]],
}
"""Layouts of samples as ``qwen_sample`` takes them. Grids are not those of windows, nor square."""
MIXED = "pictures, videos and text"


def samples(name: str, row: str = MIXED) -> list[dict]:
    return [qwen_sample(name, 7 * number + 1, layout) for number, layout in enumerate(ROWS[row])]


@pytest.mark.parametrize("ulysses, ring", LAYOUTS if ALL else [(2, 2)])
@pytest.mark.parametrize("row", ROWS if ALL else [MIXED])
def test_loss_and_gradients_are_those_of_one_process_in_float64(row, ulysses, ring):
    cases = [
        Case(name, ulysses, ring, [[samples(name, row)]], double=True, frame_micro_batch=2) for name in NAMES
    ]
    for case, found in zip(cases, largest_errors(cases), strict=True):
        print(f"{case.name} ulysses={ulysses} ring={ring} {row}: {max(found.values()):.1e}")
        # The router of a mixture of experts rounds to float32 inside.
        assert max(found.values()) < (1e-6 if "moe" in case.name else 1e-12), (case.name, found)


@cache
def own_error(name: str, row: str) -> float:
    """How far all gradients of one process in float32 are from those in float64."""
    _, wanted = truth(in_float64(build(name)), samples(name, row))
    _, grads = truth(build(name), samples(name, row))
    return relative_errors({key: grad.double() for key, grad in grads.items()}, wanted)["all"]


@pytest.mark.parametrize("ulysses, ring", LAYOUTS if ALL else [(2, 1), (1, 2)])
@pytest.mark.parametrize("row", ROWS if ALL else [MIXED])
def test_loss_and_gradients_are_those_of_one_process_in_float32(row, ulysses, ring):
    cases = [Case(name, ulysses, ring, [[samples(name, row)]], frame_micro_batch=3) for name in NAMES]
    for case, found in zip(cases, largest_errors(cases), strict=True):
        own = own_error(case.name, row)
        print(f"{case.name} ulysses={ulysses} ring={ring} {row}: all {found['all']:.1e}, own error {own:.1e}")
        assert found["loss"] < 1e-6 and found["all"] < max(1e-6, 1.5 * own), (case.name, own, found)


@pytest.mark.parametrize("weights, name", [("fsdp", "qwen3_vl"), ("ddp", "qwen2_5_vl"), ("fsdp_whole", "qwen3_vl_moe")])
def test_a_replica_with_text_only_trains_beside_one_with_pictures(weights, name):
    """DDP is not told to look for unused weights: there are none."""
    steps = [[samples(name), [text_sample(5, 11)]], [[text_sample(6, 7)], samples(name, "one sample")]]
    case = Case(name, 1, 2 if weights == "fsdp" else 1, steps, double=True, weights=weights, frame_micro_batch=2)
    (found,) = largest_errors([case])
    assert max(found.values()) < (1e-6 if "moe" in name else 1e-12), found


def test_a_text_only_row_touches_all_weights_of_the_tower():
    for name in ("qwen2_vl", "qwen3_vl"):
        assert pool.run(2, untouched, Case(name, 1, 2, [[samples(name, "text")]])) == [set(), set()]


def recomputed(rank: int, name: str) -> tuple[float, float]:
    """How far gradients with recomputed units are from those with kept ones, and those with another seed."""
    grads = []
    for recompute, seed in ((False, 1), (True, 1), (True, 2)):
        case = Case(name, 2, 1, [], double=True, weights="fsdp", recompute=recompute, frame_micro_batch=2)
        model, mm_sp = make(case)
        for block in model.model.visual.blocks:
            block.attn.attention_dropout = 0.5
        torch.manual_seed(seed + rank)
        model(**mm_sp.collator()(samples(name))).loss.backward()
        grads.append(gradients(model, "fsdp"))
    kept, again, other = grads
    return relative_errors(again, kept)["all"], relative_errors(other, kept)["all"]


def test_recomputed_units_have_the_dropout_of_the_first_time():
    for again, with_another_seed in pool.run(2, recomputed, "qwen3_vl"):
        assert again < 1e-12
        assert with_another_seed > 1e-3


def test_a_sliding_window_of_the_language_model_counts_tokens_and_not_positions():
    windows = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    (found,) = largest_errors([Case("qwen2_5_vl", 1, 2, [[samples("qwen2_5_vl")]], double=True, model=windows)])
    assert max(found.values()) < 1e-12, found


NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}


def prompt(name: str, layout: list, seed: int = 3) -> dict:
    sample = qwen_sample(name, seed, layout)
    return stock_inputs(sample) | {"attention_mask": torch.ones_like(sample["input_ids"])[None]}


def generated(model: PreTrainedModel, inputs: dict, **how) -> tuple[list[int], torch.Tensor]:
    out = model.generate(**inputs, **GREEDY | how)
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


def questions(rank: int, name: str) -> list[tuple[bool, float]]:
    """A prompt by itself, and on one cache a first question and a second with one more picture."""
    model = build(name).eval()
    first = [4, (4, 6), 3, (3, 4, 4), 5]
    longer = [*first, 3, (2, 4), 4]
    wanted = [generated(model, prompt(name, layout)) for layout in (first, longer)]
    mm_sp = enable_mm_sp(model, 1, 2)
    cache = mm_sp.cache()
    got = [generated(model, prompt(name, first), prefill_chunk_size=9, past_key_values=cache)]
    second = prompt(name, longer)
    rows = int(second["image_grid_thw"][0].prod())
    unread = {"pixel_values": second["pixel_values"][rows:], "image_grid_thw": second["image_grid_thw"][1:]}
    left_out = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    second = {key: value for key, value in second.items() if key not in left_out} | unread
    got.append(generated(model, second, past_key_values=cache))
    return [
        (text == want, (logits - scores).abs().max().item())
        for (text, logits), (want, scores) in zip(got, wanted, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES if ALL else ["qwen2_5_vl", "qwen3_vl"])
def test_generated_text_and_logits_are_those_of_one_process(name):
    for found in pool.run(2, questions, name):
        for same_text, error in found:
            assert same_text and error < 2e-5


def collator(name: str, cp: int, rank: int) -> ShardCollator:
    """As a worker of a DataLoader gets it."""
    return pickle.loads(pickle.dumps(ShardCollator(GridShape(ring=cp), rank, adapter_of(config(name)))))


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_those_of_the_stock_model_for_random_documents(name):
    model, collate = build(name).model, collator(name, 1, 0)
    draw = np.random.default_rng(5)
    for seed in range(100):
        sizes = draw.integers(1, 5, (draw.integers(1, 6), 4))
        layout: list = [(int(t), 2 * int(h), 2 * int(w))[text % 2 :] for t, h, w, text in sizes]
        layout = [part for medium in layout for part in (int(draw.integers(1, 9)), medium)] + [3]
        sample = qwen_sample(name, seed, layout)
        inputs = stock_inputs(sample)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        wanted, _ = model.get_rope_index(**{key: inputs[key] for key in keys if key in inputs})
        got = collate([sample])["position_ids"]
        assert torch.equal(got[..., : wanted.shape[-1]], wanted)


def test_lists_of_numbers_are_the_same_sample():
    sample = samples("qwen2_5_vl")[2]
    lists = {key: value.tolist() for key, value in sample.items()}
    wanted, got = collator("qwen2_5_vl", 2, 0)([sample]), collator("qwen2_5_vl", 2, 0)([lists])
    for key in ("input_ids", "labels", "position_ids", "mm_sp_pixels"):
        assert torch.equal(got[key], wanted[key])


def test_padding_on_either_side_is_taken_out_and_positions_begin_behind_it():
    sample = samples("qwen3_vl")[0]
    tokens, fills = len(sample["input_ids"]), {"input_ids": IMAGE, "labels": 3, "mm_token_type_ids": 1, "attention_mask": 0}
    whole = sample | {"attention_mask": torch.ones(tokens, dtype=torch.int64)}
    for sides in ((5, 0), (0, 5), (2, 3)):
        padded = {
            key: torch.nn.functional.pad(value, sides, value=fills[key]) if key in fills else value
            for key, value in whole.items()
        }
        wanted, got = collator("qwen3_vl", 2, 1)([sample]), collator("qwen3_vl", 2, 1)([padded])
        for key in ("input_ids", "labels", "position_ids", "mm_sp_pixels"):
            assert torch.equal(got[key], wanted[key])


class _Watched:
    """Rows of patches that remember which were asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows, self.asked = rows, []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> torch.Tensor:
        self.asked += range(part.start, part.stop)
        return self._rows[part]


def test_units_are_dealt_by_their_patches_and_each_is_read_on_one_rank_only():
    sample = qwen_sample("qwen3_vl", 1, [3, (8, 8), 2, (4, 4, 4), 2])  # 64 patches, and four times 16
    asked, rows = [], []
    for rank in range(2):
        pictures, videos = [_Watched(sample["pixel_values"])], [_Watched(sample["pixel_values_videos"])]
        batch = collator("qwen3_vl", 2, rank)([sample | {"pixel_values": pictures, "pixel_values_videos": videos}])
        asked.append((pictures[0].asked, videos[0].asked))
        rows.append(batch["mm_sp_pixels"])
    assert asked == [([*range(64)], []), ([], [*range(64)])]
    assert torch.equal(torch.cat(rows), torch.cat([sample["pixel_values"], sample["pixel_values_videos"]]))


def broken(name: str, **changes: Any) -> dict:
    sample = qwen_sample(name, 1, [3, (4, 4), 2, (2, 4, 2), 2])
    return {key: value for key, value in (sample | changes).items() if value is not None}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen2_vl", {"image_grid_thw": None}, "sample 0 has pixel_values without image_grid_thw; give both"),
        ("qwen2_vl", {"pixel_values_videos": None}, "has video_grid_thw without pixel_values_videos; give both"),
        ("qwen2_vl", {"image_grid_thw": [[1, 4, 3]]}, "height and width must be multiples of 2 patches"),
        ("qwen2_vl", {"image_grid_thw": [[1, 4, 8]]}, "has 16 patches in pixel_values but image_grid_thw needs 32"),
        ("qwen2_vl", {"pixel_values": [torch.zeros(9, 216)]}, "has pixel_values of 9 patches but image_grid_thw needs 16"),
        (
            "qwen2_vl",
            {"pixel_values": torch.zeros(4, 216), "image_grid_thw": [[1, 2, 2]]},
            "has 4 image tokens (id 61) in group 0 but image_grid_thw needs 1, a token for 2 x 2 patches",
        ),
        (
            "qwen3_vl",
            {"pixel_values_videos": None, "video_grid_thw": None},
            "has 2 groups of video tokens (id 65) but video_grid_thw has 0 rows of 0 temporal patches",
        ),
        ("qwen2_vl", {"second_per_grid_ts": [1.0]}, "has second_per_grid_ts, which MM-SP cannot shard"),
        ("qwen2_5_vl", {"second_per_grid_ts": [1.0, 2.0]}, "has 2 second_per_grid_ts but 1 videos; give one for each"),
        ("qwen2_vl", {"pixel_values": torch.zeros(16, 7)}, "patches have shape (16, 7) but the model's vision tower takes"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused_with_what_is_wrong(name, changes, message):
    with pytest.raises(ValueError) as error:
        collator(name, 1, 0)([broken(name, **changes)])
    assert message in str(error.value)


def test_a_video_without_text_between_its_parts_is_refused_where_the_model_needs_it():
    sample = qwen_sample("qwen2_vl", 1, [3, (2, 4, 4), 2])
    with pytest.raises(ValueError, match="has 1 groups of video tokens .* 1 rows of 2 temporal patches; give each a group"):
        collator("qwen3_vl", 1, 0)([sample])


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("qwen2_vl", {"attention_dropout": 0.2}, "attention_dropout=0.2 is not supported; set attention_dropout=0.0"),
        ("qwen3_vl_moe", {"output_router_logits": True}, "set output_router_logits=False"),
        (
            "qwen2_5_vl",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
            "rope_type=dynamic takes its angles from the longest position",
        ),
    ],
)
def test_a_setting_that_would_give_wrong_gradients_is_refused_by_name(name, settings, message):
    with pytest.raises(ValueError) as error:
        check_model(build(name, **settings), 1, ATTENTION)
    assert message in str(error.value)


def test_every_model_of_the_family_is_in_the_registry_and_its_samples_have_all_tokens():
    assert set(NAMES) <= set(ADAPTERS)
    for name in NAMES:
        sample = samples(name)[0]
        assert {IMAGE, VIDEO} <= set(sample["input_ids"].tolist())


def layer_calls(rank: int, room: int) -> tuple[int, dict[str, torch.Tensor]]:
    """How often the first layer of the tower runs in a step with gradient checkpointing, and the gradients."""
    case = Case("qwen3_vl", 1, 2, [], double=True, weights="fsdp", recompute=True, frame_micro_batch=2)
    with patch.object(accelerator, "device_memory_bytes", lambda: room):
        model, mm_sp = make(case)
        calls: list[int] = []
        model.model.visual.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
        batch = mm_sp.collator()(samples("qwen3_vl"))
        model(**batch).loss.backward()
    return len(calls), gradients(model, "fsdp")


def test_a_tower_that_can_keep_the_inputs_of_its_layers_runs_twice_and_another_three_times():
    for (dropped, wanted), (kept, found) in zip(*(pool.run(2, layer_calls, room) for room in (0, 10**9)), strict=True):
        assert 2 * dropped == 3 * kept
        assert relative_errors(found, wanted)["all"] < 1e-12

"""The collator of MM-SP: whole samples in, each rank's share out, nothing lost and nothing invented."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from megatron_vila.hf.mm_sp.adapters.llava_onevision import LlavaOnevision
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import IGNORE
from megatron_vila.plan.row_plan import AttentionPlan
from tests.hf.mm_sp_cases import PER_FRAME, SIDE, VIDEO, text_sample, video_sample


def collator(cp: int, rank: int, video: LlavaOnevision | None) -> ShardCollator:
    return ShardCollator(GridShape(ring=cp), rank, video)


TOKENS = LlavaOnevision(VIDEO, PER_FRAME, 1, SIDE)


def whole(samples: list[dict], cp: int, key: str, video: LlavaOnevision | None = None) -> np.ndarray:
    """The row put together again from all ranks' shares."""
    batches = [collator(cp, rank, video)(samples) for rank in range(cp)]
    row = np.full(int(batches[0]["mm_sp_row"].cu_seqlens[-1]), -1)
    for batch in batches:
        row[batch["mm_sp_row"].positions] = batch[key][0].numpy()
    return row


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_shares_of_all_ranks_are_the_padded_documents_once_each(cp):
    samples = [text_sample(1, 13), text_sample(2, 1)]
    ids, positions = whole(samples, cp, "input_ids"), whole(samples, cp, "position_ids")
    padded = -(-13 // (2 * cp)) * 2 * cp
    assert ids[:13].tolist() == samples[0]["input_ids"].tolist()
    assert ids[padded] == samples[1]["input_ids"][0]
    assert positions[: padded + 1].tolist() == [*range(padded), 0]
    assert len(ids) == padded + 2 * cp


def test_labels_are_shifted_within_each_document_before_the_cut():
    samples = [text_sample(1, 5), text_sample(2, 6)]
    labels = whole(samples, 2, "labels")
    first, second = (sample["labels"].tolist() for sample in samples)
    assert labels[:8].tolist() == [*first[1:], *[IGNORE] * 4]
    assert labels[8:].tolist() == [*second[1:], *[IGNORE] * 3]


def test_every_rank_knows_the_counts_of_the_whole_row():
    samples = [text_sample(1, 13), text_sample(2, 6, slice(3, 5))]
    rows = [collator(4, rank, None)(samples)["mm_sp_row"] for rank in range(4)]
    assert {row.supervised for row in rows} == {12 + 2}
    assert {row.tokens for row in rows} == {19}
    assert sum(len(row.selected) for row in rows) == 14


class _Watched:
    """A video that remembers which frames were asked for."""

    def __init__(self, frames: int) -> None:
        self._frames, self.asked = frames, []

    def __len__(self) -> int:
        return self._frames

    def __getitem__(self, part: slice) -> torch.Tensor:
        self.asked += range(part.start, part.stop)
        return torch.zeros(part.stop - part.start, 3, SIDE, SIDE)


@pytest.mark.parametrize("frames", [[5, 3], [1], []])
def test_each_frame_is_asked_for_on_one_rank_only(frames):
    asked = []
    for rank in range(4):
        videos = [_Watched(n) for n in frames]
        sample = video_sample(1, [-3, *frames, -2]) | {"pixel_values_videos": videos}
        batch = collator(4, rank, TOKENS)([sample])
        mine = [(i, frame) for i, video in enumerate(videos) for frame in video.asked]
        assert batch["mm_sp_pixels"].shape == (len(mine), 3, SIDE, SIDE)
        asked += mine
    assert asked == [(i, frame) for i, n in enumerate(frames) for frame in range(n)]


def test_lists_arrays_and_tensors_with_a_batch_dimension_are_the_same_sample():
    sample = text_sample(1, 9)
    forms = [
        sample,
        {key: value.tolist() for key, value in sample.items()},
        {key: value.numpy() for key, value in sample.items()},
        {key: value[None] for key, value in sample.items()},
    ]
    shares = [collator(2, 1, None)([form])["input_ids"].tolist() for form in forms]
    assert shares == [shares[0]] * 4


def test_padding_looks_like_text_even_if_the_video_token_is_zero():
    batch = collator(1, 0, LlavaOnevision(0, PER_FRAME, 1, SIDE))([{"input_ids": [5, 6, 7]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1]]


def test_a_batch_without_labels_has_no_labels():
    assert "labels" not in collator(2, 0, None)([{"input_ids": [1, 2, 3]}])


def test_the_plan_of_the_row_is_made_in_the_collator():
    """For rank 6 of two replicas: ring rank 1, Ulysses rank 0 of the second one."""
    grid, sample = GridShape(ulysses=2, ring=2, dp=2), video_sample(1, [-3, 5, 3, -2])
    row = ShardCollator(grid, 6, TOKENS)([sample, sample])["mm_sp_row"]
    wanted = AttentionPlan.of(row.cu_seqlens, grid, 1)
    assert row.attention.lengths == wanted.lengths
    assert row.attention.order.tolist() == wanted.order.tolist() and row.attention.inverse.tolist() == wanted.inverse.tolist()
    # 16 frames on 4 ranks: rank 2 makes the frames 8 to 11, the first of the second sample, and no video of theirs ends.
    assert row.vision.most == 4 and [unit.tokens for unit in row.vision.units] == [PER_FRAME] * 4
    assert sum(row.vision.reshard.send_counts) == 4 * PER_FRAME


def test_collator_and_row_travel_to_workers():
    batch = pickle.loads(pickle.dumps(collator(2, 0, TOKENS)))([video_sample(1, [-3, 2])])
    assert pickle.loads(pickle.dumps(batch["mm_sp_row"])).tokens == 3 + 2 * PER_FRAME + 1


@pytest.mark.parametrize(
    "sample, message",
    [
        ({}, "sample 0 has no input_ids"),
        ({"input_ids": [1, 6.5]}, "sample 0 has input_ids that are no whole numbers"),
        ({"input_ids": [1, 2], "labels": ["a", "b"]}, "sample 0 has labels that are no whole numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "sample 0 has 1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "sample 0 has 1 attention_mask for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "attention_mask takes out all of them"),
        ({"input_ids": [1] * 5, "attention_mask": [0, 1, 0, 1, 0]}, "attention_mask 0 at token 2, between tokens with 1"),
        ({"input_ids": [1], "pixel_values": 0}, "give a picture as a video of one frame"),
        ({"input_ids": [1], "position_ids": [0]}, "sample 0 has position_ids, which MM-SP cannot shard"),
        (
            {"input_ids": [1, VIDEO, VIDEO], "pixel_values_videos": [torch.zeros(3, 3, SIDE, SIDE)]},
            "sample 0 has 2 video tokens (id 65) but videos of 3 frames need 13: 4 for each frame and 1 after each video",
        ),
        ({"input_ids": [1, VIDEO]}, "sample 0 has 1 video tokens (id 65) but videos of no frames need 0"),
        (
            {"input_ids": [VIDEO, 1, *[VIDEO] * 4], "pixel_values_videos": [torch.zeros(1, 3, SIDE, SIDE)]},
            "sample 0 has tokens of frame 0 that are not consecutive",
        ),
        (
            {"input_ids": [VIDEO] * 5, "pixel_values_videos": [torch.zeros(1, 3, 9, 9)]},
            "frames have shape (1, 3, 9, 9) but the model's vision tower takes [frames, 3, 12, 12]",
        ),
    ],
)
def test_bad_samples_are_refused_with_what_is_wrong(sample, message):
    with pytest.raises(ValueError) as error:
        collator(1, 0, TOKENS)([sample])
    assert message in str(error.value)


def test_a_video_for_a_text_model_is_refused():
    with pytest.raises(ValueError, match="the model takes text only"):
        collator(2, 0, None)([{"input_ids": [1], "pixel_values_videos": [torch.zeros(1, 3, SIDE, SIDE)]}])


def test_everything_wrong_with_a_batch_is_said_at_once():
    with pytest.raises(ValueError) as error:
        collator(2, 0, None)([{"input_ids": [1], "labels": [1]}, {"input_ids": []}, {"inputs": [1]}])
    for part in (
        "sample 1 has no token",
        "sample 2 has inputs",
        "sample 2 has no input_ids",
        "some samples have labels",
    ):
        assert part in str(error.value)


def test_a_batch_without_samples_is_refused():
    with pytest.raises(ValueError, match="the batch has no samples"):
        collator(2, 0, None)([])


def test_a_mapping_in_the_place_of_a_list_of_samples_is_refused():
    with pytest.raises(ValueError, match="it is one mapping; give a list of samples"):
        collator(2, 0, None)({"input_ids": [[1, 2]]})

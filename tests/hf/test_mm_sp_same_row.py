"""Ranks that share a sample under MM-SP but were given different ones are told so, before anything else is exchanged."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from tests.hf.mm_sp_cases import VIDEO, build, text_sample, video_sample
from tests.ranks import pool

SAMPLE = text_sample(1, 13)
OTHER_IDS = SAMPLE | {"input_ids": torch.where(torch.arange(13) == 12, 61, SAMPLE["input_ids"])}
OTHER_LABELS = SAMPLE | {"labels": torch.where(torch.arange(13) < 3, -100, SAMPLE["labels"])}
UNLABELED = {"input_ids": SAMPLE["input_ids"]}
# Labels of both are shifted alike, and both have the same ids in the padded row of ulysses=2.
SHORTER = {"input_ids": torch.tensor([7, 8, 0]), "labels": torch.tensor([7, 8, -100])}
SHORTEST = {"input_ids": torch.tensor([7, 8]), "labels": torch.tensor([7, 8])}
TWO_VIDEOS = video_sample(3, [-2, 2, 1, -3])


def other_videos(sample: dict) -> dict:
    """The same tokens and as many frames, but the second video begins one frame earlier."""
    first, second = sample["pixel_values_videos"]
    return sample | {"pixel_values_videos": [first[:1], torch.cat([first[1:], second])]}


def call(rank: int, name: str, rows: list[list[dict]], layout: dict) -> tuple[str, list[float]]:
    """What a call with the row of this rank says, and the losses of the first row on all ranks before and after it."""
    mm_sp = enable_mm_sp(model := build(name), **layout)
    collate, said = mm_sp.collator(), ""
    losses = [model(**collate(rows[0])).loss.item()]
    try:
        model(**collate(rows[rank]))
    except ValueError as error:
        said = str(error)
    return said, [*losses, model(**collate(rows[0])).loss.item()]


@pytest.mark.parametrize("layout", [{"ulysses": 2}, {"ring": 2}], ids=["ulysses", "ring"])
@pytest.mark.parametrize(
    "first, second, differ",
    [
        ([SAMPLE], [OTHER_IDS], "input_ids differ"),
        ([SAMPLE], [OTHER_LABELS], "labels differ"),
        ([SAMPLE], [UNLABELED], "label fields, labels differ"),
        ([SAMPLE], [text_sample(2, 29)], "tokens, input_ids, labels, lengths of samples differ"),
        ([SAMPLE], [SAMPLE, SAMPLE], "samples, tokens, input_ids, labels, lengths of samples differ"),
        ([SAMPLE, SHORTER], [SHORTER, SAMPLE], "input_ids, labels, lengths of samples differ"),
        ([SHORTER], [SHORTEST], "tokens, lengths of samples differ"),
    ],
)
def test_every_rank_is_told_what_differs_and_the_next_row_trains(first, second, differ, layout):
    for said, (before, after) in pool.run(2, call, "qwen2", [first, second], layout):
        assert f"given different samples: {differ}. Rank 0 of the group has {len(first)} samples of" in said
        assert "DistributedSampler(dataset, mm_sp.dp_size, mm_sp.dp_rank)" in said
        assert before == after > 0


def test_videos_that_are_cut_otherwise_are_other_samples():
    rows = [[TWO_VIDEOS], [other_videos(TWO_VIDEOS)]]
    assert (rows[0][0]["input_ids"] == VIDEO).sum() == (rows[1][0]["input_ids"] == VIDEO).sum()
    for said, _ in pool.run(2, call, "llava_onevision", rows, {"ulysses": 2}):
        assert "pictures and videos differ" in said


def test_one_rank_of_four_is_named_on_all_of_its_group_and_replicas_may_differ():
    rows = [[SAMPLE], [SAMPLE], [SAMPLE], [OTHER_IDS]]
    for said, _ in pool.run(4, call, "qwen2", rows, {"ulysses": 2, "ring": 2}):
        assert "Rank 0 of the group has" in said and ", rank 3 has" in said
    for said, _ in pool.run(4, call, "qwen2", [[SAMPLE], [SAMPLE], [OTHER_IDS], [OTHER_IDS]], {"ulysses": 2}):
        assert said == ""


def with_usual_sampler(rank: int, dataset: list[dict]) -> str:
    mm_sp = enable_mm_sp(model := build("llama"), ulysses=2)
    try:
        for batch in DataLoader(dataset, sampler=DistributedSampler(dataset), collate_fn=mm_sp.collator()):
            model(**batch)
    except ValueError as error:
        return str(error)
    return ""


def test_the_usual_sampler_is_refused():
    for said in pool.run(2, with_usual_sampler, [text_sample(seed, 16) for seed in range(4)]):
        assert "given different samples: input_ids, labels differ" in said

"""Batches of a Trainer under MM-SP: collators are taken apart into samples, and samples are dealt to replicas."""

from __future__ import annotations

import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import DataCollatorWithFlattening, Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import GRPOTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TrlCollator

from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.trainer import MMSPTrainer
from megatron_vila.hf.mm_sp.trainer_data import InOrderOfLengths, SampleCollator, deal, take_apart
from megatron_vila.plan.grid import GridShape
from tests.hf.mm_sp_cases import text_sample
from tests.hf.mm_sp_trainer_ranks import pad

SHARD = ShardCollator(GridShape.of(1), 0, None)
EXAMPLES = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [9, 4], "labels": [9, 4]}]
"""Of four and two tokens, three and one of them learned."""


def learned(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Ids and shifted labels of each sample of an unsharded row."""
    bounds = batch["mm_sp_row"].cu_seqlens
    return [
        (batch["input_ids"][0, first:last].tolist(), batch["labels"][0, first:last].tolist())
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]


WANTED = [([5, 6, 7, 8], [6, 7, 8, -100]), ([9, 4], [4, -100])]
PACKED = [{"input_ids": [5, 6, 7, 8, 9, 4], "labels": [-100, 6, 7, 8, 9, 4], "seq_lengths": [4, 2]}]


@pytest.mark.parametrize(
    "stock, samples",
    [
        (pad, [{name: torch.tensor(values) for name, values in example.items()} for example in EXAMPLES]),
        (TrlCollator(pad_token_id=0, pad_to_multiple_of=8), EXAMPLES),
        (TrlCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8), EXAMPLES),
        (TrlCollator(pad_token_id=0, padding_free=True), PACKED),
        (DataCollatorWithFlattening(), EXAMPLES),
        (DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True), EXAMPLES),
    ],
)
def test_collators_are_taken_apart_into_the_same_samples(stock, samples):
    assert learned(SampleCollator(stock, SHARD)(samples)) == WANTED


def shuffled(samples: list[dict]) -> dict:
    return pad(samples) | {"labels": torch.randint(0, 9, pad(samples)["labels"].shape)}


def joined(samples: list[dict]) -> dict:
    ids = torch.cat([sample["input_ids"] for sample in samples])[None]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    "stock, message",
    [
        (shuffled, "data_collator=shuffled makes of 2 samples together something else"),
        (joined, "data_collator=joined makes of 2 samples together something else"),
        (lambda samples: {"pixel_values": 1}, "returns the keys pixel_values; MM-SP needs input_ids"),
        (lambda samples: samples, "returns list"),
    ],
)
def test_a_collator_that_cannot_be_taken_apart_is_refused_by_name(stock, message):
    with pytest.raises(ValueError, match="data_collator=") as error:
        SampleCollator(stock, SHARD)([text_sample(1, 6), text_sample(2, 9)])
    assert message in str(error.value)


def test_positions_that_start_again_beside_a_mask_are_refused():
    rows = {"input_ids": [[1, 2, 3]], "position_ids": [[0, 1, 0]], "attention_mask": [[1, 1, 1]]}
    with pytest.raises(ValueError, match="leave the mask out of packed rows"):
        take_apart(rows, "mine")


def test_a_mask_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="data_collator=mine returns attention_mask 0 between tokens with 1"):
        take_apart({"input_ids": [[1, 2, 3, 4]], "attention_mask": [[0, 1, 0, 1]]}, "mine")


class Numbers(Dataset):
    """Its samples are an index and a random number of the process that reads it."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, random.random()


def batches(loader: DataLoader) -> list[list]:
    return [[tuple(sample) for sample in batch] for batch in loader]


def dealt(dataset, replica: int, replicas: int, is_training: bool, **settings) -> DataLoader:
    loader = DataLoader(dataset, 2, collate_fn=list, **settings)
    mm_sp = SimpleNamespace(dp_size=replicas, dp_rank=replica)
    return deal(loader, mm_sp, torch.device("cpu"), seed=5, is_training=is_training, split=False)


def test_ranks_of_a_replica_get_the_same_samples_with_the_same_random_numbers_and_replicas_share_the_rest():
    numbers = Numbers()
    read = []
    for rank in range(4):
        torch.manual_seed(100 + rank)  # what a rank drew before must not matter
        read.append(batches(dealt(numbers, rank // 2, 2, True, sampler=RandomSampler(numbers), num_workers=2)))
    assert read[0] == read[1] != read[2] == read[3]
    indices = [{sample[0] for batch in read[rank] for sample in batch} for rank in (0, 2)]
    assert indices[0] | indices[1] == set(range(11))
    assert len(read[0]) == len(read[2])
    assert {sample[1] for batch in read[0] for sample in batch}.isdisjoint(sample[1] for batch in read[2] for sample in batch)


def test_evaluation_deals_each_sample_once():
    numbers = list(range(11))
    read = [list(dealt(numbers, replica, 2, False)) for replica in range(2)]
    assert read == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]


def test_the_order_by_length_follows_from_seed_and_epoch():
    lengths = [3, 9, 4, 8, 5, 7, 6, 2, 11]
    samplers = []
    for seed in range(2):
        torch.manual_seed(seed)
        samplers.append(InOrderOfLengths(LengthGroupedSampler(2, lengths=lengths), seed=7))
    orders = [list(sampler) for sampler in samplers]
    samplers[0].set_epoch(1)
    assert orders[0] == orders[1] != list(samplers[0])


def test_classes_that_mm_sp_cannot_train_are_refused():
    class WithLoss(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 0

    with pytest.raises(TypeError, match="name MMSPTrainer first"):
        type("Late", (Trainer, MMSPTrainer), {})
    with pytest.raises(TypeError, match="GRPOTrainer of TRL generates or needs logits"):
        type("Generating", (MMSPTrainer, GRPOTrainer), {})
    with pytest.raises(TypeError, match="WithLoss has its own compute_loss, which MMSPTrainer would hide"):
        type("Hiding", (MMSPTrainer, WithLoss), {})
    for base in (Trainer, Seq2SeqTrainer, SFTTrainer):
        type("Fine", (MMSPTrainer, base), {})


def test_a_missing_accelerate_is_named():
    code = "import sys; sys.modules['accelerate'] = None; import megatron_vila.hf.mm_sp.trainer"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "it needs accelerate: pip install 'transformers[torch]'" in run.stderr

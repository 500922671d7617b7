"""Batches of a Trainer under MM-SP: its collator is taken apart into samples, and batches are dealt to the replicas.

A row of MM-SP holds whole samples, so what a collator of Transformers, of TRL or of the user makes of one sample is one sample
of the row. Ranks of a replica get the same batches; accelerate would give each process its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import seed_worker

from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.scored import SCORED, ScoreCollator
from megatron_vila.plan.row import IGNORE

SAMPLES = "mm_sp_samples"
"""Key of a batch: the number of samples that the collator was given. It is no argument of the model."""

_ROW_KEYS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What padding-free collators tell of the samples in a row; MM-SP works it out again."""


@dataclass
class SampleCollator:
    """``collate_fn`` of a Trainer under MM-SP: ``stock`` makes samples one at a time, ``shard`` this rank's share of their row.

    ``stock`` is called with one sample, and with a whole batch only once, to see that it makes the same of it. Samples that it
    packs into one row (``position_ids`` that start again at 0) are taken apart. The default collators of ``Trainer`` are left
    out: ``shard`` reads samples, and videos stay unread until a rank needs its frames. Raises ``ValueError`` for a collator that
    cannot be taken apart.
    """

    stock: Callable[[list], Any]
    shard: ShardCollator
    _is_known: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._is_default = self.stock is default_data_collator or type(self.stock) is DataCollatorWithPadding

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that a Trainer saves with the model; None if the stock collator has none."""
        return getattr(self.stock, "tokenizer", None)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if isinstance(self.stock, ShardCollator | ScoreCollator):
            batch = self.stock(samples)
        else:
            batch = self.shard(list(samples) if self._is_default else self._one_by_one(samples))
        return batch | {SAMPLES: len(samples)}

    def _one_by_one(self, samples: Sequence[Any]) -> list[dict[str, Any]]:
        made = [document for sample in samples for document in self._documents([sample])]
        if not self._is_known:
            whole = self._documents(list(samples))
            if [_learned(document) for document in made] != [_learned(document) for document in whole]:
                raise ValueError(
                    f"data_collator={_name(self.stock)} makes of {len(samples)} samples together something else than of each "
                    "by itself (random masks, or samples that it joins), so MM-SP cannot take its batches apart; do that in "
                    "the dataset and leave data_collator out"
                )
            self._is_known = True
        return made

    def _documents(self, samples: list[Any]) -> list[dict[str, Any]]:
        # A collator may change its samples, as TRL's for pictures does.
        rows = self.stock([copy.copy(sample) for sample in samples])
        if not isinstance(rows, Mapping) or "input_ids" not in rows:
            keys = f"the keys {', '.join(rows)}" if isinstance(rows, Mapping) else type(rows).__name__
            raise ValueError(
                f"data_collator={_name(self.stock)} returns {keys}; MM-SP needs input_ids and labels of whole samples"
            )
        return take_apart(rows, _name(self.stock))


def take_apart(rows: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Samples of a stock batch: those of each of its rows [rows, tokens], without padding.

    Where there is no ``attention_mask``, ``position_ids`` that are 0 begin a sample. Samples of one token are left out, since
    nothing is learned from them (padding looks like that). What belongs to the whole batch, such as pixels, goes to the only row.
    ``name`` is what messages call the collator. Raises ``ValueError``.
    """
    ids, mask = _rows(rows["input_ids"]), rows.get("attention_mask")
    labels = None if rows.get("labels") is None else _rows(rows["labels"])
    masks = np.ones_like(ids) if mask is None else _rows(mask)
    starts = np.zeros_like(ids, dtype=bool)
    starts[:, 0] = True
    if rows.get("position_ids") is not None and np.ndim(rows["position_ids"]) == 2:
        restarts = (_rows(rows["position_ids"]) == 0) & (masks != 0)
        if mask is not None and (restarts.sum(axis=1) > 1).any():
            raise ValueError(
                f"data_collator={name} returns position_ids that start again beside an attention_mask; leave the mask out of "
                "packed rows"
            )
        starts |= restarts if mask is None else False
    media = {
        key: value for key, value in rows.items() if key not in ("input_ids", "labels", "attention_mask", *_ROW_KEYS)
    }
    media = {key: value for key, value in media.items() if value is not None}
    documents = []
    for row in range(len(ids)):
        bounds = [*np.flatnonzero(starts[row]), ids.shape[1]]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            kept = np.flatnonzero(masks[row, first:last]) + first
            if len(kept) and kept[-1] - kept[0] >= len(kept):
                raise ValueError(
                    f"data_collator={name} returns attention_mask 0 between tokens with 1; padding is taken out at the ends "
                    "only: leave these tokens out of the sample, or attend to them"
                )
            document = {"input_ids": ids[row, kept]} | ({} if labels is None else {"labels": labels[row, kept]})
            documents.append(document)
    long = [document for document in documents if len(document["input_ids"]) > 1]
    documents = long or documents[:1]
    if media and len(documents) == 1:
        documents[0] |= media
    return documents


def _rows(values: Any) -> np.ndarray:
    return np.atleast_2d(np.asarray(values, dtype=np.int64))


def _learned(document: Mapping[str, Any]) -> tuple:
    """Ids and labels up to the last token that is learned: what follows it changes nothing."""
    ids, labels = document["input_ids"], document.get("labels")
    end = len(ids) if labels is None else 1 + max(np.flatnonzero(labels != IGNORE), default=-1)
    return tuple(ids[:end]), None if labels is None else tuple(labels[1:end])


def _name(collator: Any) -> str:
    return getattr(collator, "__name__", type(collator).__name__)


class InOrderOfLengths(Sampler):
    """A ``LengthGroupedSampler`` whose order follows from ``seed`` and the epoch, so that all ranks and a resumed run agree."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class WholeStream(IterableDataset):
    """An iterable dataset that accelerate does not cut into shards of files, which may end at different times."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)


def deal(loader: DataLoader, mm_sp: Any, device: torch.device, seed: int, is_training: bool, split: bool) -> DataLoader:
    """The loader of this rank's replica, prepared by accelerate. Random numbers of its workers and its order follow from
    ``seed``, equal on the ranks of a replica. In training each replica gets equally many samples, some of them twice if
    their number does not divide; in evaluation each sample goes to one replica. No collective."""
    loader.generator = torch.Generator().manual_seed(seed)
    if is_training and loader.num_workers:
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=mm_sp.dp_rank)
    prepared = prepare_data_loader(
        loader,
        device,
        num_processes=mm_sp.dp_size,
        process_index=mm_sp.dp_rank,
        split_batches=split and is_training,
        put_on_device=True,
        dispatch_batches=False,
        even_batches=is_training,
        use_seedable_sampler=True,
        data_seed=seed,
    )
    # Otherwise accelerate's gather_for_metrics drops the values of some ranks at the end of an epoch.
    prepared._drop_last = True
    return prepared


class EvaluationLoader:
    """Batches of evaluation. A replica whose batches have ended gives its last one again, with nothing to learn, until all
    replicas have ended: every rank takes part in every exchange. Each batch is preceded by an all-reduce of two numbers over
    ``everyone`` if there are several replicas."""

    def __init__(self, loader: DataLoader, mm_sp: Any, device: torch.device) -> None:
        self._loader, self._mm_sp, self._device = loader, mm_sp, device
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches, last = iter(self._loader), None
        while True:
            batch = next(batches, None)
            last = batch if batch is not None else last
            have, can = self._of_all(batch is not None, last is not None)
            if not have:
                return
            if last is None or not can:
                raise ValueError(
                    f"the evaluation set has fewer batches than the {self._mm_sp.dp_size} data-parallel replicas; set a smaller "
                    "per_device_eval_batch_size"
                )
            yield batch if batch is not None else _nothing_learned(last)

    def _of_all(self, has_batch: bool, has_last: bool) -> tuple[bool, bool]:
        """Whether any replica has another batch, and whether all have one to give again."""
        if self._mm_sp.dp_size == 1:
            return has_batch, has_last
        told = torch.tensor([has_batch, not has_last], dtype=torch.int64, device=self._device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._mm_sp.groups.everyone)
        return bool(told[0]), not bool(told[1])


def _nothing_learned(batch: dict[str, Any]) -> dict[str, Any]:
    if SCORED in batch:
        return batch | {SAMPLES: 0}
    row = replace(batch["mm_sp_row"], selected=batch["mm_sp_row"].selected[:0], supervised=0)
    return batch | {"mm_sp_row": row, "labels": torch.full_like(batch["labels"], IGNORE), SAMPLES: 0}

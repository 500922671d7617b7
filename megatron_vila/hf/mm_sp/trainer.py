"""Trainer of Transformers and SFTTrainer of TRL under MM-SP: ``class MyTrainer(MMSPTrainer, SFTTrainer): pass``.

The model is one on which ``enable_mm_sp`` was called. The ranks of a replica get the same samples, each its share of them; loss
and gradient are the mean over the supervised tokens of the whole step, as in one process with all samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from megatron_vila.hf.mm_sp.scored import SCORED, ScoreCollator
from megatron_vila.hf.mm_sp.trainer_checks import check_arguments, check_class, check_trainer
from megatron_vila.hf.mm_sp.trainer_data import (
    SAMPLES,
    EvaluationLoader,
    InOrderOfLengths,
    SampleCollator,
    WholeStream,
    deal,
)

_REPLACED = (
    "compute_loss", "prediction_step", "evaluation_loop", "predict", "_get_num_items_in_batch", "_get_dataloader",
    "_get_train_sampler", "_track_num_input_tokens", "_load_from_checkpoint", "_load_best_model",
    "get_total_train_batch_size", "create_accelerator_and_postprocess",
)  # fmt: skip


_Trainer: Any = object
"""What the mixin will stand before."""


class MMSPTrainer(_Trainer):
    """Mixin that stands before ``Trainer``, ``SFTTrainer`` or a class that derives from them.

    Batches, counts of tokens and losses are those of data-parallel replicas: ``per_device_train_batch_size`` samples for each
    replica, which the ulysses x ring ranks of a replica share. ``evaluate`` returns the loss of one process with
    ``per_device_eval_batch_size`` samples in a batch. ``num_input_tokens_seen`` counts tokens without padding, once for all
    ranks that share them. Checkpoints are those of the stock Trainer, and a run resumes from either's.

    ``mm_sp`` is the object that ``enable_mm_sp`` returned. Raises ``ValueError`` that lists every argument which would give
    wrong results, and ``TypeError`` for base classes that MM-SP cannot train.
    """

    data_collator: Any
    _total_train_tokens: int
    loss_is_scaled_for_ga = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, MMSPTrainer, _REPLACED)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        constructor = super().__init__
        self.mm_sp, settings = check_arguments(type(self).__name__, constructor, args, kwargs)
        if settings is not None:
            _find_unused(settings, self.mm_sp)
        constructor(*args, **kwargs)
        check_trainer(self, self.mm_sp)
        shard = self.mm_sp.collator()
        self._is_preference = hasattr(self, "ref_model")
        # The mean over pairs is that of each micro-batch.
        self.loss_is_scaled_for_ga = not self._is_preference
        collator = ScoreCollator(self.data_collator, shard) if self._is_preference else self.data_collator
        self.data_collator = SampleCollator(collator, shard)
        self._reads_log_probs = any(base.__module__.startswith("trl.") for base in type(self).__mro__)
        self._evaluated: list[tuple[torch.Tensor, int]] = []

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate deal batches to replicas instead of processes."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_data_loader = self._prepare_data_loader

    def _prepare_data_loader(self, loader: DataLoader, **_unused: Any) -> DataLoader:
        split = self.args.accelerator_config.split_batches
        prepared = deal(loader, self.mm_sp, self.args.device, self._order_seed(), self._is_training_loader, split)
        self.accelerator._dataloaders.append(prepared)
        return prepared

    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        self._is_training_loader = is_training
        replicas, batch = self.mm_sp.dp_size, self.args.eval_batch_size
        if isinstance(dataset, IterableDataset) and replicas > 1:
            if not is_training:
                raise ValueError(
                    f"evaluation of an IterableDataset over {replicas} data-parallel replicas would count its last samples "
                    "twice; give a dataset with a length, or choose ulysses * ring = the number of processes"
                )
            dataset = WholeStream(dataset)
        elif self._is_preference and not is_training and replicas > 1 and len(dataset) % (batch * replicas):
            # TRL gathers numbers of each pair, equally many from each process.
            raise ValueError(
                f"an evaluation set of {len(dataset)} pairs gives the {replicas} data-parallel replicas unequal batches; leave "
                f"out {len(dataset) % (batch * replicas)} pairs or set another per_device_eval_batch_size"
            )
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        return loader if is_training else EvaluationLoader(loader, self.mm_sp, self.args.device)

    def _get_train_sampler(self, *args: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args)
        return InOrderOfLengths(sampler, self._order_seed()) if isinstance(sampler, LengthGroupedSampler) else sampler

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step in all replicas."""
        return self._train_batch_size * args.gradient_accumulation_steps * self.mm_sp.dp_size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Supervised tokens of the step, int64 []. All-reduce over all processes. Raises ``ValueError`` for samples without
        labels."""
        if self._is_preference:
            return None
        if any("labels" not in batch for batch in batch_samples):
            raise ValueError("the samples have no labels; give labels beside input_ids (-100 where nothing is learned)")
        return self.mm_sp.count_supervised(batch_samples)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a micro-batch: its share of the mean over the ``num_items_in_batch`` supervised tokens of the step. The model
        reduces it over all processes; the loss of TRL is this rank's part of it, times the number of processes."""
        inputs = {name: value for name, value in inputs.items() if name != SAMPLES}
        if self._reads_log_probs:
            if not self._is_preference:
                inputs["shift_labels"] = inputs.pop("labels")
            seen = self._total_train_tokens
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self.model.training:
                self._total_train_tokens = seen + self._tokens(inputs)
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return result
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple:
        """Mean loss [] of the batch of this rank's replica. Raises ``ValueError`` where predictions are asked for."""
        if not prediction_loss_only:
            raise ValueError("MM-SP returns no predictions; call evaluate() for the loss, or generate")
        inputs = self._prepare_inputs(inputs)
        samples, supervised = inputs[SAMPLES], _row(inputs).supervised
        with torch.no_grad(), self.compute_loss_context_manager(), self.mm_sp.loss_of_replica():
            if self._reads_log_probs and not self._is_preference:
                # This rank's sum, times the number of processes.
                sums = self.compute_loss(model, inputs, num_items_in_batch=torch.ones((), device=self.args.device))
                dist.all_reduce(sums, group=self.mm_sp.groups.sample)
                loss = sums / (self.args.world_size * max(supervised, 1))
            else:
                loss = self.compute_loss(model, inputs)
        # The stock Trainer leaves out batches without labels, whose mean is no number.
        self._evaluated.append((loss, samples if supervised else 0))
        return loss, None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in one process: mean loss of each batch, weighted by its samples. All-reduce over all processes."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.zeros(2, dtype=torch.float64)
        for loss, samples in self._evaluated:
            sums += torch.tensor([float(loss) * samples, samples], dtype=torch.float64)
        sums = sums.to(self.args.device)
        dist.all_reduce(sums, group=self.mm_sp.groups.everyone)
        output.metrics[f"{metric_key_prefix}_loss"] = (sums[0] / sums[1]).item()
        return output

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ``ValueError``: no rank has logits of whole samples."""
        raise ValueError("MM-SP returns no predictions; call evaluate() for the loss, or generate")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.model._keys_to_ignore_on_save or ())
        self._were_missing = not set(load_result.missing_keys) <= tied
        if not self._were_missing:
            super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._were_missing = False
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._were_missing = False
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, folder: str) -> None:
        """Load the weights of a model whose saved tensors have other names than its parameters. The stock Trainer only warns
        of them, and goes on with the weights that it had."""
        if self._were_missing:
            loaded = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(loaded.state_dict())

    def _track_num_input_tokens(self, inputs: dict) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += self._tokens(inputs)

    def _tokens(self, inputs: dict) -> int:
        """Tokens without padding of the batches of all replicas. All-reduce over all processes."""
        tokens = torch.tensor(_row(inputs).tokens, device=self.args.device)
        dist.all_reduce(tokens, group=self.mm_sp.groups.everyone)
        return int(tokens) // self.mm_sp.groups.grid.cp


def _row(inputs: dict) -> Any:
    return inputs[SCORED].shard["mm_sp_row"] if SCORED in inputs else inputs["mm_sp_row"]


def _find_unused(settings: Any, mm_sp: Any) -> None:
    """Under DDP look for weights without a gradient in models with a tower: some never use its last layers."""
    if settings.ddp_find_unused_parameters is None and mm_sp.collator().adapter is not None:
        settings.ddp_find_unused_parameters = True

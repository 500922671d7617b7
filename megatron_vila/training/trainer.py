"""The training run: a plain loop over Megatron-Core's pieces, from a configuration to a checkpoint, metrics and a plot."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_vila import accelerator
from megatron_vila.checkpoint.resume import (
    ResumePoint,
    changes,
    is_of_a_run,
    kept_settings,
    other_text,
    resume_point,
    settings_of,
)
from megatron_vila.checkpoint.save_load import load_checkpoint, read_info, save_checkpoint, set_aside
from megatron_vila.config.load import dump_config
from megatron_vila.config.schema import Config
from megatron_vila.data.chat import describe
from megatron_vila.data.dataset import NoUsableSampleError
from megatron_vila.data.loader import LoadedRow
from megatron_vila.errors import CheckpointError
from megatron_vila.models.decoder.gated import reason_for_apart
from megatron_vila.models.language import attention_kernel
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.agreement import on_all_ranks, on_rank_zero
from megatron_vila.parallel.kernels import faster_kernels
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.sizes import head_dim
from megatron_vila.training.errors import NonFiniteError, NothingToLearnError, TooManyBrokenError
from megatron_vila.training.evaluate import evaluate, remarks
from megatron_vila.training.feed import (
    JUDGED_FROM,
    held_out_gaps,
    open_dataset,
    tell_bad_records,
    tokenizer_warnings,
    training_loader,
)
from megatron_vila.training.lock import LockedError, RunLock
from megatron_vila.training.memory_report import write_memory_report
from megatron_vila.training.metrics import MetricsLogger, StepMetrics
from megatron_vila.training.optimizer import PARTS, apply_step, build_optimizer, learning_rates, wrap_ddp
from megatron_vila.training.profile import traced
from megatron_vila.training.report_files import Reporting, replace_file
from megatron_vila.training.step import Pass, mean_loss
from megatron_vila.training.stop import StopRequest
from megatron_vila.training.watch import Watch

logger = logging.getLogger(__name__)

DATA_COUNTS = ("drawn", "replaced_broken", "replaced_too_long", "truncated", "unsupervised", "left_out")
"""Counts of ``RowStats`` that are summed over the run and reported."""


@dataclass(frozen=True)
class Outcome:
    """What a step came to; equal on all ranks. ``lr`` are the rates that it used."""

    loss: float
    supervised: int
    updated: bool
    grad_norm: float
    lr: dict[str, float]


class Trainer:
    """One rank of a run. ``Trainer(config).run()`` needs the default process group; it is collective over all ranks.

    The order of construction matters: groups, seeds, model, weights of ``checkpoint.load``, DDP and optimizer (which copies
    16-bit weights), then the state of a run that goes on.

    ``stop`` notes signals from its installation on; without one the run notes those that come while it runs. ``lock`` is the
    writer's lock of the folder and ``watch`` what the other ranks know of this one's progress; both are for runs of processes.
    """

    def __init__(
        self,
        config: Config,
        stop: StopRequest | None = None,
        lock: RunLock | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.config = config
        self.device, self.dtype = accelerator.device(), accelerator.dtype_of(config.train.precision)
        accelerator.set_deterministic(config.train.deterministic)
        self.topology = ParallelTopology.create(config.parallel, config.train.timeout_minutes)
        self.is_writer = self.topology.rank == 0
        model_parallel_cuda_manual_seed(config.train.seed)
        model = VilaModel(config, self.topology, self.dtype, self.device)
        found = resume_point(config)
        if found.checkpoint is None and config.checkpoint.load:
            loaded = load_checkpoint(config.checkpoint.load, [model])
            self._say(f"weights of {config.checkpoint.load}")
        self.model = wrap_ddp(model, config.optim, model.config)
        self.optimizer, self.scheduler = build_optimizer([self.model], config.optim, config.train, self.dtype)
        self.step, self.skipped, self.counts = 0, 0, dict.fromkeys(DATA_COUNTS, 0)
        self.settings = on_rank_zero(lambda: settings_of(config), "the settings that a checkpoint keeps")
        if found.checkpoint is not None:
            self._resume(found)
        elif config.checkpoint.load:
            failed = f"the weights of {config.checkpoint.load} do not fit this run"
            for line in on_all_ranks(lambda: other_text(kept_settings(loaded), self.settings), failed):
                self._say(f"warning: other than for the weights of {config.checkpoint.load}: {line}")
        origin = found.checkpoint or config.checkpoint.load
        # An export needs the files that the weights once came with.
        self.hugging_face = read_info(origin).get("hugging_face") if origin and self.is_writer else None
        self.forward = Pass(self.model, self.topology, config.model.llm, self.dtype, self.device)
        self._stop, self._lock, self._watch = stop or StopRequest(), lock, watch
        self.stopped_by = 0
        """signal that ended the run before ``train.steps``, the same on all ranks; 0 without one"""
        self.saved = found.checkpoint
        """the checkpoint of the step that this run stands at, None without one"""

    def run(self) -> dict[str, Any]:
        """Train to ``train.steps``, save, evaluate; returns the run's summary on the writer rank, {} elsewhere.

        After a signal to any rank (``stop.py``) the step in work is finished and saved, ``stopped_by`` is set, and the method
        returns. Raises ``NonFiniteError`` as ``train.on_nan`` says, ``NothingToLearnError`` if an epoch holds no label and
        ``TooManyBrokenError`` by ``data.max_broken`` once all is saved, on all ranks at once.
        """
        train = self.config.train
        peak = _peak_of_device(self.dtype)
        world = self.topology.grid.world_size
        with self._stop, contextlib.ExitStack() as undo:
            undo.callback(gc.unfreeze)
            if self.is_writer:
                self._describe_run()
            if self.config.data.eval and (gaps := on_rank_zero(lambda: held_out_gaps(self.config))):
                self._say(f"warning: {gaps}")
            with MetricsLogger(
                train.output, self.is_writer, train.steps, world, peak, train.log_every, self.step
            ) as metrics:
                results = self._loop(metrics)
                self._at("ending")
                comparison = write_memory_report(
                    self.config, self.model, self.optimizer, self.model.module.host.peak_bytes
                )
                if torch.cuda.is_available():  # on a CPU libraries outweigh a model that fits there
                    metrics.message(comparison)
                if self.stopped_by:
                    metrics.message(self._stop_line())
                summary = metrics.finish({"stopped": bool(self.stopped_by), **self.counts, **results})
            if not self.stopped_by:
                self._refuse_broken(at_least=1)
            return summary

    def _loop(self, metrics: MetricsLogger) -> dict[str, float]:
        """All steps that are left; returns the last evaluation, nothing if a signal ended the loop (``stopped_by``).

        Evaluation can fail for what is wrong with held-out files: a checkpoint that is due at the same step is saved first.
        """
        train, data, saving = self.config.train, self.config.data, self.config.checkpoint
        loader, rows_per_epoch = training_loader(self.config, self.topology)
        first, barren_rows, skips_in_a_row = self.step + 1, 0, 0
        accelerator.reset_peak_memory()
        with loader:
            if self.step < train.steps:
                self.stopped_by = self._agreed_signal()
            while self.step < train.steps and not self.stopped_by:
                started_s = time.perf_counter()
                self._at("reading samples", self.step + 1)
                rows = loader.rows(self.step)
                self._at("in the forward and backward pass or the update", self.step + 1)
                with traced(self.config.profile, self.step + 1, self.topology.rank, train.output):
                    outcome = self._train_step(rows)
                self.step, self.saved = self.step + 1, None
                self.skipped += not outcome.updated
                self._at("adding up what was measured")
                self.stopped_by, record = self._measure(rows, outcome, started_s)
                metrics.step(record)
                if self.step == first:
                    # A full collection over a model and its compiled code halts one rank, and so all, for some half a second.
                    gc.collect()
                    gc.freeze()
                barren_rows = 0 if outcome.supervised else barren_rows + train.global_batch_size
                skips_in_a_row = 0 if outcome.updated or not outcome.supervised else skips_in_a_row + 1
                self._guard(outcome, skips_in_a_row, barren_rows >= rows_per_epoch, metrics)
                finished = self.step == train.steps
                too_broken = self._too_broken(JUDGED_FROM)
                if saving.save and (finished or self.stopped_by or too_broken or _due(self.step, saving.save_every)):
                    self._at("saving a checkpoint")
                    self._save()
                if too_broken and not finished:
                    self._refuse_broken(JUDGED_FROM)
                if data.eval and not self.stopped_by and _due(self.step, train.eval_every) and not finished:
                    self._evaluate(metrics)
        if self.step == train.steps and not data.eval:
            self.stopped_by = 0  # the signal came with the last step: nothing is left to go on with
        if self.stopped_by or not data.eval:
            return {}
        found = self._evaluate(metrics)
        return {"held_out_accuracy": found["accuracy"], "chance": found["chance"]} if "accuracy" in found else {}

    def _give_way(self) -> None:
        """Raise ``LockedError`` on all ranks: what another run writes to the folder must not be mixed with this one's."""
        owner = on_rank_zero(lambda: self._lock.lost)
        raise LockedError(
            f"train.output={self.config.train.output} was taken over by {owner}; this run ends after step {self.step} and saves "
            "nothing there"
        )

    def _at(self, phase: str, step: int | None = None) -> None:
        if self._watch is not None:
            self._watch.at(self.step if step is None else step, phase)

    def _agreed_signal(self) -> int:
        """The signal that any rank was sent, 0 without one. A maximum over all ranks."""
        sent = torch.tensor(self._stop.signal, dtype=torch.float64, device=self.device)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX)
        return int(sent.item())

    def _stop_line(self) -> str:
        name, saving = signal.Signals(self.stopped_by).name, self.config.checkpoint
        if not saving.save:
            return f"stopped by {name} after step {self.step}; nothing is saved, because checkpoint.save=false"
        changed = "" if saving.resume else " with checkpoint.resume=true"
        return f"stopped by {name} after step {self.step}; the same command{changed} goes on from there"

    def _evaluate(self, metrics: MetricsLogger) -> dict[str, float]:
        self._at("evaluating")
        found = evaluate(self.config, self.forward)
        metrics.evaluation(self.step, found)
        for line in remarks(found):
            metrics.message(line)
        return found

    def _train_step(self, rows: Sequence[LoadedRow]) -> Outcome:
        """Forward, backward and update. No weight changes if the step has no label or anything is not finite."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.forward.run(rows)
        loss, supervised = mean_loss(reports, self.topology, self.device)
        updated, norm = False, 0.0
        if supervised:
            updated, norm = apply_step(self.optimizer, math.isfinite(loss))
        rates = learning_rates(self.optimizer, self.config.optim)
        self.scheduler.step(1)
        return Outcome(loss, supervised, updated, norm, rates)

    def _measure(self, rows: Sequence[LoadedRow], outcome: Outcome, started_s: float) -> tuple[int, StepMetrics]:
        """The signal that any rank was sent (0: none), and the step's record. A sum over dp and a maximum over all ranks."""
        flops = sum(
            model_flops(r.row.lengths, r.row.supervised_tokens, len(r.row.frames), self.config.model, self.config.optim).total
            for r in rows
        )
        counts = [sum(getattr(r.stats, name) for r in rows) for name in DATA_COUNTS]
        tokens, frames = sum(sum(r.row.lengths) for r in rows), sum(len(r.row.frames) for r in rows)
        sums = torch.tensor([tokens, frames, flops, *counts], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self.topology.dp)
        wait_s, peak_gib = sum(r.stats.wait_s for r in rows), accelerator.peak_memory_bytes() / 2**30
        lost = self.is_writer and self._lock is not None and bool(self._lock.lost)
        largest = torch.tensor([self._stop.signal, lost, wait_s, peak_gib], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tokens, frames, flops, *counts = sums.tolist()
        sent, lost, wait_s, peak_gib = largest.tolist()
        if lost:
            self._give_way()
        for name, count in zip(DATA_COUNTS, counts, strict=True):
            self.counts[name] += int(count)
        return int(sent), StepMetrics(
            step=self.step,
            loss=outcome.loss,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
            tokens=int(tokens),
            supervised_tokens=outcome.supervised,
            frames=int(frames),
            model_flops=flops,
            step_s=time.perf_counter() - started_s,
            data_wait_s=wait_s,
            peak_memory_gib=peak_gib,
            skipped=self.skipped,
            counts=dict(self.counts),
        )

    def _guard(self, outcome: Outcome, skips_in_a_row: int, barren_epoch: bool, metrics: MetricsLogger) -> None:
        """End the run on all ranks where going on would be wrong or pointless."""
        train = self.config.train
        if outcome.updated:
            return
        if not outcome.supervised:
            metrics.message(f"step {self.step} has no supervised token: nothing updated")
            if barren_epoch:
                raise NothingToLearnError(
                    f"a whole epoch of data.train={self.config.data.train} held no supervised token; the samples need answers "
                    "(turns from gpt) that fit into train.seq_length"
                )
            return
        rates = f"optim.lr={self.config.optim.lr}"
        for part in PARTS:
            if getattr(self.config.optim, part).lr is not None:
                rates += f", optim.{part}.lr={getattr(self.config.optim, part).lr}"
        what = f"step {self.step} gives loss {outcome.loss} and gradient norm {outcome.grad_norm}"
        cure = f"look at the data of this step and at {rates}"
        if train.on_nan == "stop":
            raise NonFiniteError(
                f"{what}, and train.on_nan=stop: the run ends, weights and checkpoints are as before the step; {cure}, or drop "
                "such updates with train.on_nan=skip"
            )
        metrics.message(f"{what}: update skipped ({self.skipped} so far)")
        if skips_in_a_row > train.max_skips:
            raise NonFiniteError(
                f"{what}: {skips_in_a_row} updates skipped in a row, more than train.max_skips={train.max_skips}; {cure}"
            )

    def _too_broken(self, at_least: int) -> bool:
        """Whether ``data.max_broken`` is exceeded, once ``at_least`` samples were drawn; equal on all ranks."""
        broken, drawn = self.counts["replaced_broken"] + self.counts["left_out"], self.counts["drawn"]
        return drawn >= at_least and broken > self.config.data.max_broken * drawn

    def _refuse_broken(self, at_least: int) -> None:
        """End the run on all ranks if too many samples were broken; what was trained is saved."""
        if not self._too_broken(at_least):
            return
        broken, drawn = self.counts["replaced_broken"] + self.counts["left_out"], self.counts["drawn"]
        raise TooManyBrokenError(
            f"{broken} of the {drawn} samples drawn in {self.step} steps were broken ({100 * broken / drawn:.1f} %), more than "
            f"data.max_broken={self.config.data.max_broken} allows; the log names them, and `python -m megatron_vila.data check` "
            "finds all. The counts stay with the run: after mending the files go on with a higher data.max_broken, or start anew"
        )

    def _resume(self, found: ResumePoint) -> None:
        checkpoint = found.checkpoint
        extra = load_checkpoint(checkpoint, [self.model], self.optimizer, self.scheduler, check=not found.checked)
        if not is_of_a_run(extra):
            raise CheckpointError(
                f"cannot go on from {checkpoint}: no run of this package saved it; start one from it with checkpoint.load"
            )
        self.step, self.skipped, self.counts = extra["step"], extra["skipped"], self.counts | extra["counts"]
        changed = on_all_ranks(
            lambda: changes(kept_settings(extra), self.settings), f"cannot go on from {checkpoint}"
        )
        if found.passed_over:
            places = set_aside(found.passed_over, checkpoint)
            for place, problem in zip(places, found.passed_over.values(), strict=True):
                self._say(f"damaged and passed over, now called {place}, delete it when you like: {problem}")
        self._say(f"going on from {checkpoint} after step {self.step}")
        for line in changed:
            self._say(f"changed since the checkpoint: {line}")

    def _save(self) -> None:
        extra = {"step": self.step, "skipped": self.skipped, "counts": self.counts, "settings": self.settings}
        info = {
            "model": self.config.model.name,
            "layout": asdict(self.config.parallel) | {"dp": self.topology.grid.dp},
            "config": asdict(self.config),
            "hugging_face": self.hugging_face,
        }
        self.saved = save_checkpoint(
            self.config.train.output,
            self.step,
            [self.model],
            self.optimizer,
            self.scheduler,
            extra,
            self.config.checkpoint.keep,
            info,
        )

    def _describe_run(self) -> None:
        """Keep the configuration beside the run and show the first sample as the model sees it."""
        path = Path(self.config.train.output) / "config.yaml"
        text = dump_config(self.config)
        Reporting().attempt(str(path), lambda: replace_file(path, lambda temporary: temporary.write_text(text)))
        tell_bad_records(self.config)
        dataset = open_dataset(self.config, self.config.data.train)
        for warning in tokenizer_warnings(self.config, dataset.encoder.tokenizer):
            self._say(f"warning: {warning}")
        for line in slower_parts(self.config, attention_kernel(self.model.module.llm.decoder), self.dtype, self.device):
            self._say(line)
        # Where no sample can be used, the loader says so on all ranks at once.
        with contextlib.suppress(NoUsableSampleError):
            logger.info("first sample:\n%s", describe(dataset.document(0), dataset.encoder.tokenizer))

    def _say(self, text: str) -> None:
        if self.is_writer:
            logger.warning(text)


def slower_parts(config: Config, kernel: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What runs on a GPU in the place of a faster part, and why: ``kernel`` for attention, SwiGLU outside of its products."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return []
    model, lines = config.model, []
    if model.attention == "auto":
        missing = faster_kernels(kernel, head_dim(model.llm), dtype, device, config.train.deterministic)
        lines = [f"attention by {kernel}, not {name}: {reason}" for name, reason in missing.items()]
    reason = reason_for_apart(device)
    return lines + ([f"SwiGLU apart from the products around it: {reason}"] if reason else [])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _peak_of_device(dtype: torch.dtype) -> float | None:
    return accelerator.machine().peak_flops if dtype == torch.bfloat16 else None

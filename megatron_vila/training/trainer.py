"""The training run: a plain loop over Megatron-Core's pieces, from a configuration to a checkpoint, metrics and a plot."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
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
from megatron_vila.data.dataset import NoUsableSampleError, VilaDataset
from megatron_vila.data.loader import LoadedStep
from megatron_vila.data.rows import LoadedRow
from megatron_vila.data.stream import StreamState
from megatron_vila.data.tokenizer import tokenizer_warnings
from megatron_vila.errors import CheckpointError
from megatron_vila.models.decoder.gated import reason_for_apart
from megatron_vila.models.language import attention_kernel
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.agreement import on_all_ranks, on_rank_zero
from megatron_vila.parallel.kernels import faster_kernels
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plain_files import replace_file
from megatron_vila.plan.flops import model_flops
from megatron_vila.plan.sizes import head_dim
from megatron_vila.training.errors import TooManyBrokenError
from megatron_vila.training.feed import JUDGED_FROM, training_loader
from megatron_vila.training.guards import DATA_COUNTS, Outcome, UpdateGuard, too_many_broken
from megatron_vila.training.loading import loading_of
from megatron_vila.training.lock import LockedError, RunLock
from megatron_vila.training.memory_report import write_memory_report
from megatron_vila.training.optimizer import apply_step, build_optimizer, learning_rates, wrap_ddp
from megatron_vila.training.place import carried_counts, kept_place, order_key, place_of
from megatron_vila.training.profile import traced
from megatron_vila.training.report_files import Reporting
from megatron_vila.training.roles import RunFacts, StepMetrics, Task, Watcher
from megatron_vila.training.run_data import RunData, open_run_data
from megatron_vila.training.step import Pass, mean_loss
from megatron_vila.training.stop import StopRequest

logger = logging.getLogger(__name__)


class Trainer:
    """One rank of a run. ``Trainer(config).run()`` needs the default process group; it is collective over all ranks.

    The order of construction matters: groups, seeds, model, weights of ``checkpoint.load``, DDP and optimizer (which copies
    16-bit weights), then the state of a resumed run.

    ``tasks`` are what the run does beside training, and ``watchers`` are told what it does (``roles.py``); ``start.py`` chooses
    both. ``stop`` notes signals from its installation on; without it, the run notes those that come during ``run``. ``lock`` is
    the lock of the output folder that the writer's process holds; with it, the run ends if another one takes the folder over.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[Task] = (),
        watchers: Sequence[Watcher] = (),
        stop: StopRequest | None = None,
        lock: RunLock | None = None,
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
        self.model = wrap_ddp(model, config.optim)
        self.optimizer, self.scheduler = build_optimizer([self.model], config.optim, config.train, self.dtype)
        self.step, self.skipped, self.counts = 0, 0, dict.fromkeys(DATA_COUNTS, 0)
        self.stream, self._kept_place = StreamState(), None
        self.settings = on_rank_zero(lambda: settings_of(config), "the settings that a checkpoint keeps")
        if found.checkpoint is not None:
            self._resume(found.checkpoint, found)
        elif config.checkpoint.load:
            failed = f"the weights of {config.checkpoint.load} do not fit this run"
            for line in on_all_ranks(lambda: other_text(kept_settings(loaded), self.settings), failed):
                self._say(f"warning: other than for the weights of {config.checkpoint.load}: {line}")
        origin = found.checkpoint or config.checkpoint.load
        # An export needs the JSON files of the Hugging Face folder from which the weights were imported.
        self.hugging_face = read_info(origin).get("hugging_face") if origin and self.is_writer else None
        self.forward = Pass(self.model, self.topology, config.model.llm)
        self._tasks, self._watchers = tasks, watchers
        self._stop, self._lock = stop or StopRequest(), lock
        self.stopped_by = 0
        """signal that ended the run before ``train.steps``, the same on all ranks; 0 without one"""
        self.saved = found.checkpoint
        """the checkpoint of the step that this run stands at, None without one"""

    def run(self) -> dict[str, Any]:
        """Train to ``train.steps``, save, do the tasks; returns the run's summary on the writer rank, {} elsewhere.

        After a signal to any rank (``stop.py``) the current step is finished and saved, ``stopped_by`` is set, and the method
        returns. Raises ``NonFiniteError`` as ``train.on_nan`` says, ``NothingToLearnError`` if an epoch holds no label and
        ``TooManyBrokenError`` by ``data.max_broken`` once all is saved, on all ranks at once.
        """
        train = self.config.train
        facts = RunFacts(
            self.is_writer, train.steps, self.step, self.topology.grid.world_size, _peak_of_device(self.dtype)
        )
        with self._stop, contextlib.ExitStack() as undo:
            undo.callback(gc.unfreeze)
            if self.is_writer:
                self._keep_config()
            data = open_run_data(self.config, self.is_writer)
            if self.is_writer:
                self._describe_run(data.train)
            for task in self._tasks:
                for line in on_rank_zero(partial(task.warnings, data)):
                    self._say(f"warning: {line}")
            for watcher in self._watchers:
                undo.callback(watcher.close)
                watcher.start(facts)
            results = self._loop(data)
            self._at("ending")
            comparison = write_memory_report(
                self.config, self.model, self.optimizer, self.model.module.host.peak_bytes
            )
            if torch.cuda.is_available():  # on a CPU libraries outweigh a model that fits there
                self._message(comparison)
            if self.stopped_by:
                self._message(self._stop_line())
            summary: dict[str, Any] = {"stopped": bool(self.stopped_by), **self.counts, **results}
            for watcher in self._watchers:
                summary = watcher.finish(summary)
            if not self.stopped_by and (error := self._too_broken(at_least=1)):
                raise error
            return summary if self.is_writer else {}

    def _loop(self, data: RunData) -> dict[str, float]:
        """Run all steps that are left. Returns what the tasks leave in the summary after the last one, {} after a signal.

        A checkpoint is saved before the tasks of the same step, because a task can fail, such as an evaluation whose files are
        damaged.
        """
        train, saving = self.config.train, self.config.checkpoint
        self._order = order_key(self.config, data.blend)
        if self.step:
            self.stream, told = place_of(self._kept_place, self._order, self.counts["drawn"], len(data.train))
            if told:
                self._say(f"warning: {told}")
        loader = training_loader(self.config, self.topology, data, self.stream)
        first, guard = self.step + 1, UpdateGuard(self.config, loader.epoch)
        accelerator.reset_peak_memory()
        with loader:
            if self.step < train.steps:
                self.stopped_by = self._agreed_signal()
            while self.step < train.steps and not self.stopped_by:
                started_s = time.perf_counter()
                self._at("reading samples", self.step + 1)
                loaded = loader.next_step()
                self._at("in the forward and backward pass or the update", self.step + 1)
                with traced(self.config.profile, self.step + 1, self.topology.rank, train.output):
                    outcome = self._train_step(loaded.rows)
                self.step, self.saved, self.stream = self.step + 1, None, loaded.plan.after
                self.skipped += not outcome.updated
                self._at("adding up what was measured")
                self.stopped_by, record = self._measure(loaded, outcome, started_s)
                plan = loaded.plan
                del loaded  # its pixels make room for those of later steps
                for watcher in self._watchers:
                    watcher.step(record)
                if self.step == first:
                    # Later garbage collections leave out the model and its compiled code: going through them takes a rank about
                    # half a second, for which all ranks wait.
                    gc.collect()
                    gc.freeze()
                guard.judge(self.step, outcome, plan.counts["drawn"], self.skipped, self._message)
                finished = self.step == train.steps
                too_broken = self._too_broken(JUDGED_FROM)
                if saving.save and (finished or self.stopped_by or too_broken or _due(self.step, saving.save_every)):
                    self._at("saving a checkpoint")
                    self._save()
                if too_broken and not finished:
                    raise too_broken
                if not self.stopped_by and not finished:
                    self._do_tasks(data, is_last=False)
        if self.step == train.steps and not self._due_tasks(is_last=True):
            self.stopped_by = 0  # the signal came with the last step: nothing is left to go on with
        return {} if self.stopped_by else self._do_tasks(data, is_last=True)

    def _due_tasks(self, is_last: bool) -> list[Task]:
        return [task for task in self._tasks if task.is_due(self.step, is_last)]

    def _do_tasks(self, data: RunData, is_last: bool) -> dict[str, float]:
        """What the tasks that are due now leave in the run's summary."""
        kept: dict[str, float] = {}
        for task in self._due_tasks(is_last):
            self._at(f"in the {task.name.word}")
            results = task.run(self.forward, data)
            for watcher in self._watchers:
                watcher.result(self.step, task.name, results)
            for line in task.remarks(results):
                self._message(line)
            kept |= task.summary(results)
        return kept

    def _message(self, text: str) -> None:
        for watcher in self._watchers:
            watcher.message(text)

    def _taken_by(self) -> str:
        """Who has taken the folder over; empty without a lock or while it is held."""
        return "" if self._lock is None else self._lock.lost

    def _give_way(self) -> None:
        """Raise ``LockedError`` on all ranks: what another run writes to the folder must not be mixed with this one's."""
        owner = on_rank_zero(self._taken_by)
        raise LockedError(
            f"train.output={self.config.train.output} was taken over by {owner}; this run ends after step {self.step} and saves "
            "nothing there"
        )

    def _at(self, phase: str, step: int | None = None) -> None:
        for watcher in self._watchers:
            watcher.at(self.step if step is None else step, phase)

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
        return f"stopped by {name} after step {self.step}; the same command{changed} continues from there"

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

    def _measure(self, loaded: LoadedStep, outcome: Outcome, started_s: float) -> tuple[int, StepMetrics]:
        """The signal that any rank was sent (0: none), and the step's record. Sums over dp and all ranks, a maximum over all."""
        rows = loaded.rows
        flops = sum(
            model_flops(r.row.lengths, r.row.supervised_tokens, r.row.units, self.config.model, self.config.optim).total
            for r in rows
        )
        tokens, frames = sum(sum(r.row.lengths) for r in rows), sum(unit.frames for r in rows for unit in r.row.units)
        padded = sum(r.row.length for r in rows)
        sums = torch.tensor([tokens, padded, frames, flops], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self.topology.dp)
        wait_s, peak_gib = loaded.wait_s, accelerator.peak_memory_bytes() / 2**30
        lost = self.is_writer and bool(self._taken_by())
        own = [self._stop.signal, lost, wait_s, peak_gib, accelerator.take_copy_seconds()]
        largest = torch.tensor(own, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        tokens, padded, frames, flops = sums.tolist()
        sent, lost, wait_s, peak_gib, copy_s = largest.tolist()
        if lost:
            self._give_way()
        for name in DATA_COUNTS:
            self.counts[name] += loaded.plan.counts[name]
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
            loading=loading_of([r.stats.work for r in rows], copy_s, self.device),
            row_fill=tokens / (self.config.train.global_batch_size * self.config.train.seq_length),
            padding=1 - tokens / padded,
            predicted_spread=loaded.spread,
            counts=dict(self.counts),
        )

    def _too_broken(self, at_least: int) -> TooManyBrokenError | None:
        return too_many_broken(self.config, self.counts, self.step, at_least)

    def _resume(self, checkpoint: Path, found: ResumePoint) -> None:
        extra = load_checkpoint(checkpoint, [self.model], self.optimizer, self.scheduler, check=not found.checked)
        if not is_of_a_run(extra):
            raise CheckpointError(
                f"cannot continue from {checkpoint}: no run of this package saved it; start one from it with checkpoint.load"
            )
        self.step, self.skipped = extra["step"], extra["skipped"]
        self.counts |= {name: n for name, n in carried_counts(extra["counts"]).items() if name in DATA_COUNTS}
        self._kept_place = extra.get("stream")
        changed = on_all_ranks(
            lambda: changes(kept_settings(extra), self.settings), f"cannot continue from {checkpoint}"
        )
        if found.passed_over:
            places = set_aside(found.passed_over, checkpoint)
            for place, problem in zip(places, found.passed_over.values(), strict=True):
                self._say(f"damaged and passed over, now called {place}, delete it when you like: {problem}")
        self._say(f"continuing from {checkpoint} after step {self.step}")
        for line in changed:
            self._say(f"changed since the checkpoint: {line}")

    def _save(self) -> None:
        extra = {
            "step": self.step,
            "skipped": self.skipped,
            "counts": self.counts,
            "settings": self.settings,
            "stream": kept_place(self.stream, self._order),
        }
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
            extra=extra,
            keep=self.config.checkpoint.keep,
            info=info,
        )

    def _keep_config(self) -> None:
        """Keep the configuration beside the run."""
        path = Path(self.config.train.output) / "config.yaml"
        text = dump_config(self.config)
        Reporting().attempt(str(path), lambda: replace_file(path, lambda temporary: temporary.write_text(text)))

    def _describe_run(self, dataset: VilaDataset) -> None:
        """Warn about settings that the user may not have meant, and show the first sample as the model sees it."""
        for warning in tokenizer_warnings(self.config, dataset.encoder.tokenizer):
            self._say(f"warning: {warning}")
        for line in slower_parts(self.config, attention_kernel(self.model.module.llm.decoder), self.dtype, self.device):
            self._say(line)
        # Where no sample can be used, the loader says so on all ranks at once.
        with contextlib.suppress(NoUsableSampleError):
            logger.info("first sample:\n%s", describe(dataset.first_usable(0).document, dataset.encoder.tokenizer))

    def _say(self, text: str) -> None:
        if self.is_writer:
            logger.warning(text)


def slower_parts(config: Config, kernel: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """A line for each part that a faster one exists for, which cannot run here, and why: attention by ``kernel``, and SwiGLU."""
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

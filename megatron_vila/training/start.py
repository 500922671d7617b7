"""A run put together: the trainer with its tasks and watchers, as the command line starts it."""

from __future__ import annotations

from megatron_vila.config.schema import Config
from megatron_vila.training.evaluate import HeldOut
from megatron_vila.training.lock import RunLock
from megatron_vila.training.metrics import MetricsLogger
from megatron_vila.training.run_watch import RunWatch
from megatron_vila.training.stop import StopRequest
from megatron_vila.training.trainer import Trainer


def make_trainer(
    config: Config, stop: StopRequest | None = None, lock: RunLock | None = None, watch: RunWatch | None = None
) -> Trainer:
    """The trainer of ``config``; arguments and errors as ``Trainer``'s. Collective over all ranks."""
    tasks = [HeldOut(config)] if config.data.eval else []
    watchers = [*([watch] if watch else []), MetricsLogger(config.train.output, config.train.log_every)]
    return Trainer(config, tasks, watchers, stop, lock)

"""``torchrun ... -m megatron_vila.train CONFIG.yaml [key=value ...] [--dry-run]``: train, resume and evaluate.

Exit codes are those of ``exit_codes.py``, the same on every rank. What a rank says when it fails: ``failing/failures.py``.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_vila import exit_codes, parent
from megatron_vila.busy import CurrentStdout, busy
from megatron_vila.errors import entry_point
from megatron_vila.streams import leave

if TYPE_CHECKING:
    from megatron_vila.config.schema import Config
    from megatron_vila.failing.failures import Reporter
    from megatron_vila.training.run_watch import RunWatch
    from megatron_vila.training.stop import StopRequest

_SAMPLE = re.compile("([a-z]+:)?[0-9]+")


@entry_point
def main(arguments: Sequence[str], before_parting: Callable[[], None] = lambda: None) -> int:
    """Returns the exit code. ``before_parting`` is the last that may take time: then this rank lets the others end."""
    options = parse(arguments)
    rank = int(os.environ.get("RANK", 0))
    parent.end_with_parent()
    # Other packages' warnings concern their developers; ours go through logging.
    warnings.filterwarnings("ignore", module=r"(torch|megatron\.core|transformers|cutlass|nvidia_cutlass_dsl)\b")
    # Stacks of C++ frames where the store ends with the launcher; what matters is raised. Read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[CurrentStdout()])
    logging.getLogger("megatron_vila").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    with _busy("starting: torch, Megatron-Core and transformers"):
        from megatron_vila import accelerator

        accelerator.prepare()
        # Imported late: Megatron-Core must be prepared for this machine first.
        from megatron_vila.failing import failures

    with contextlib.suppress(OSError, ValueError):
        faulthandler.enable(2)  # what a crash in native code leaves: the stacks of Python
    reporter = failures.Reporter()
    try:
        return _run(options, rank, before_parting, reporter)
    except BaseException as error:
        return reporter.report(error)


def _each_shown(arguments: Sequence[str]) -> list[str]:
    """``--show 0 eval:1`` as ``--show 0 --show eval:1``. To argparse the second number is an override; if it takes several values
    for an option, the overrides behind them are numbers too."""
    spread, follows = [], False
    for before, word in zip(["", *arguments], arguments, strict=False):
        if follows and _SAMPLE.fullmatch(word) and before != "--show":
            spread.append("--show")
        else:
            follows = before == "--show" or word == "--show" or word.startswith("--show=")
        spread.append(word)
    return spread


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process (2) with a message if it cannot be read. The launcher looks at it first."""
    parser = argparse.ArgumentParser(prog="python -m megatron_vila.train", description="Train a long-video VLM with MM-SP.")
    parser.add_argument("config", help="YAML file, or the name of a preset")
    parser.add_argument("overrides", nargs="*", help="dotted overrides such as parallel.ulysses=2 train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check everything that can be checked before training, then exit")
    parser.add_argument("--world-size", type=int, help="ranks that a dry run checks for (default: one replica)")
    parser.add_argument("--gpu", help="GPU that a dry run plans for: h100, h200 ... or e.g. 80GB (default: this machine's)")
    parser.add_argument("--show", action="append", metavar="N", help="samples N of data.train, or eval:N, to show in a dry run")
    options = parser.parse_intermixed_args(_each_shown(arguments))
    if not options.dry_run:
        for name in ("world_size", "gpu", "show"):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} belongs to --dry-run: add that, or leave it out")
    return options


def _busy(text: str) -> contextlib.AbstractContextManager:
    """Shows ``text`` while the block takes long; nothing but on rank 0."""
    return busy(text) if int(os.environ.get("RANK", 0)) == 0 else contextlib.nullcontext()


def _run(options: argparse.Namespace, rank: int, before_parting: Callable[[], None], reporter: Reporter) -> int:
    if options.dry_run:
        return _dry_run(options) if rank == 0 else exit_codes.FINISHED
    import torch
    import torch.distributed as dist

    from megatron_vila import accelerator, processes
    from megatron_vila.config.load import load_config
    from megatron_vila.start_checks import check_start
    from megatron_vila.training.errors import NoMemoryError
    from megatron_vila.training.memory_report import out_of_memory_message
    from megatron_vila.training.run_watch import RunWatch
    from megatron_vila.training.stop import StopRequest

    minutes = _timeout_minutes(options)
    # First of all, so that what a single rank finds wrong is told and ends the others.
    processes.meet(minutes)
    with RunWatch(minutes, reporter) as watch:
        processes.init_distributed(minutes)
        stop = StopRequest()
        stop.install()
        config = load_config(options.config, options.overrides)
        for warning in check_start(config, dist.get_world_size(), accelerator.machine()):
            logging.getLogger("megatron_vila").warning("warning: %s", warning)
        try:
            status = _train(config, stop, watch, reporter, [options.config, *options.overrides])
            dist.barrier()  # a launcher ends all ranks when the first one is gone: the writer's last files come first
        except torch.OutOfMemoryError as error:
            raise NoMemoryError(out_of_memory_message(config, dist.get_world_size(), dist.get_rank(), error)) from error
        stop.ignore_further()
        processes.end_distributed()
        before_parting()
        watch.part()
    return status


def _timeout_minutes(options: argparse.Namespace) -> float:
    """``train.timeout_minutes``, its default where the configuration is wrong: that is told when all ranks have met."""
    from megatron_vila.config.load import load_config
    from megatron_vila.config.schema import TrainConfig
    from megatron_vila.errors import ConfigError
    from megatron_vila.plan.bounds import MOST

    with contextlib.suppress(ConfigError):
        minutes = load_config(options.config, options.overrides).train.timeout_minutes
        if 0 < minutes <= MOST["train.timeout_minutes"]:
            return minutes
    return TrainConfig().timeout_minutes


def _train(config: Config, stop: StopRequest, watch: RunWatch, reporter: Reporter, arguments: Sequence[str]) -> int:
    from megatron_vila.failing.failure_files import set_aside_earlier
    from megatron_vila.parallel.agreement import on_rank_zero
    from megatron_vila.training.closing import closing_lines
    from megatron_vila.training.lock import RunLock

    lock = RunLock(config.train.output)
    with contextlib.ExitStack() as held:

        def take() -> None:
            held.enter_context(lock.hold())
            set_aside_earlier(config.train.output)

        on_rank_zero(take)  # the writer holds it for all ranks
        reporter.keep_in(config.train.output)
        with _busy("starting: the model and its weights"):
            from megatron_vila.training.start import make_trainer

            trainer = make_trainer(config, stop, lock, watch)
        if trainer.is_writer:
            logging.getLogger("megatron_vila.data").setLevel(logging.INFO)
        elif trainer.topology.block_cpu.rank() == 0:
            # Each replica names the broken held-out samples that it meets; of those of training all ranks are told.
            logging.getLogger("megatron_vila.data.held_out").setLevel(logging.WARNING)
        trainer.run()
        if trainer.is_writer:
            stopped, saved = bool(trainer.stopped_by), trainer.saved
            lines = closing_lines(
                arguments, config, trainer.step, saved, stopped, skipped=trainer.skipped, counts=trainer.counts
            )
            logging.getLogger("megatron_vila").info("%s", "\n".join(lines))
    if trainer.stopped_by:
        goes_on = config.checkpoint.save and config.checkpoint.resume
        return exit_codes.STOPPED if goes_on else exit_codes.FAILED
    return exit_codes.FINISHED


def _dry_run(options: argparse.Namespace) -> int:
    """Check the settings, open the data as the trainer would and show samples; no process group is made."""
    from megatron_vila.config.load import load_config
    from megatron_vila.dry_run import dry_run
    from megatron_vila.errors import ConfigError
    from megatron_vila.plan.grid import Layout
    from megatron_vila.start_checks import planned_machine

    config, machine = load_config(options.config, options.overrides), planned_machine(options.gpu)
    world_size = options.world_size
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", Layout.of(config.parallel).size))
    if world_size < 1 and options.world_size is not None:
        raise ConfigError(f"command line: --world-size {world_size} must be at least 1")
    dry_run(config, world_size, machine, options.show)
    return exit_codes.FINISHED


if __name__ == "__main__":
    # What Python does at its end belongs to main's before_parting.
    leave(main(sys.argv[1:], atexit._run_exitfuncs))

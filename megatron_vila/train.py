"""``torchrun ... -m megatron_vila.train CONFIG.yaml [key=value ...] [--dry-run]``: train, resume and evaluate.

An error that a user can cure is printed once, by the first rank that meets it, as a message; the exit status is 2 then, on
every rank.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vila import platform

if TYPE_CHECKING:
    from megatron_vila.config.schema import Config


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_vila.train", description="Train a long-video VLM with MM-SP.")
    parser.add_argument("config", help="YAML file, or the name of a preset")
    parser.add_argument("overrides", nargs="*", help="dotted overrides such as parallel.ulysses=2 train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check everything that can be checked before training, then exit")
    parser.add_argument("--world-size", type=int, help="ranks that a dry run checks for (default: one replica)")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    # Other packages' warnings concern their developers; ours go through logging.
    warnings.filterwarnings("ignore", module=r"(torch|megatron\.core|transformers|cutlass|nvidia_cutlass_dsl)\b")
    platform.prepare()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("megatron_vila").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    # Imported late: Megatron-Core must find the platform prepared.
    from megatron_vila.config.load import ConfigError
    from megatron_vila.data.dataset import NoUsableSampleError
    from megatron_vila.data.loader import LoaderError
    from megatron_vila.host import HostMemoryError
    from megatron_vila.training.checkpoint import CheckpointError
    from megatron_vila.training.errors import NoMemoryError, NonFiniteError, NothingToLearnError

    curable = (
        ConfigError, NoUsableSampleError, LoaderError, CheckpointError, HostMemoryError, NoMemoryError, NonFiniteError,
        NothingToLearnError,
    )  # fmt: skip
    try:
        return _run(options, rank)
    except curable as error:
        if _count_failure() == 1:
            print(f"megatron_vila: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError:
        # A rank that ended with a message breaks the connections of the others: theirs is no news.
        if _count_failure() > 1:
            return 2
        raise


def _count_failure() -> int:
    """How many ranks have failed, this one included; 1 where no process group joins them."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return 1
    try:
        return dist.distributed_c10d._get_default_store().add("megatron_vila/failures", 1)
    except RuntimeError:
        # The store's own process has ended.
        return 2


def _run(options: argparse.Namespace, rank: int) -> int:
    from megatron_vila.config.load import ConfigError, load_config
    from megatron_vila.config.validate import validate

    if options.dry_run:
        return _dry_run(options) if rank == 0 else 0
    import torch
    import torch.distributed as dist

    from megatron_vila.training.errors import NoMemoryError
    from megatron_vila.training.memory_report import out_of_memory_message

    try:
        # First of all, so that what a single rank finds wrong is told and ends the others.
        platform.init_distributed()
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    config = load_config(options.config, options.overrides)
    for warning in validate(config, dist.get_world_size()):
        logging.getLogger("megatron_vila").warning("warning: %s", warning)
    try:
        _train(config)
    except torch.OutOfMemoryError as error:
        raise NoMemoryError(out_of_memory_message(config, dist.get_world_size(), dist.get_rank(), error)) from error
    platform.end_distributed()
    return 0


def _train(config: Config) -> None:
    from megatron_vila.config.load import ConfigError
    from megatron_vila.training.trainer import Trainer

    try:
        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        # What a part refuses when it is built (a kernel that is not there, a warm-up as long as the run) is a setting's fault.
        raise ConfigError(str(error)) from error
    if trainer.topology.block_cpu.rank() == 0:
        # Each replica names the broken samples that it meets.
        level = logging.INFO if trainer.topology.rank == 0 else logging.WARNING
        logging.getLogger("megatron_vila.data").setLevel(level)
    trainer.run()


def _dry_run(options: argparse.Namespace) -> int:
    """Check the settings, open the data as the trainer would and show the first samples; no process group is made."""
    from megatron_vila.config.load import load_config
    from megatron_vila.config.validate import validate
    from megatron_vila.data.chat import describe
    from megatron_vila.training.feed import open_dataset

    config = load_config(options.config, options.overrides)
    parallel = config.parallel
    replica = parallel.tp * parallel.pp * parallel.ulysses * parallel.ring
    world_size = options.world_size or int(os.environ.get("WORLD_SIZE", replica))
    for warning in validate(config, world_size):
        logging.getLogger("megatron_vila").warning("warning: %s", warning)
    for files in filter(None, (config.data.train, config.data.eval)):
        dataset = open_dataset(config, files)
        document = dataset.document(0)
        print(f"{len(dataset)} samples in {', '.join(files)}; the first one:")
        print(describe(document, dataset.encoder.tokenizer))
    print(f"dry run: everything fits together for {world_size} ranks")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

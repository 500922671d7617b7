"""``python -m megatron_vila.launch --nproc-per-node N CONFIG [key=value ...] [--dry-run]``: one node's ranks of a run.

A thin layer over torchrun's agent, made to lead the task of a batch system, which sends its signals to the leader:

* SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ("save and stop", ``training/stop.py``) go on as SIGTERM to every rank, also to
  one that is still starting, and the ranks are waited for. They never end the leader, however often and to whom they are sent.
* One line says how a run failed, without torchrun's own report.
* ``--dry-run`` starts no rank: this process checks the run for the whole world.

The exit status is that of the ranks (``exit_codes.py``). A SIGTERM that comes before ``main`` runs ends Python by itself (143), a
Ctrl-C ends it with a line (130): nothing has begun then.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker

from megatron_vila import interrupts, parent
from megatron_vila.errors import entry_point
from megatron_vila.exit_codes import FAILED, FINISHED, INTERRUPTED, STOPPED, USER_ERROR
from megatron_vila.streams import flush_streams, tell
from megatron_vila.training.stop import ASKING, asking

Worker = Callable[[list[str]], int]


@dataclass(frozen=True)
class World:
    """The nodes of a run and this one's place among them; ``address`` is node 0's."""

    nodes: int = 1
    node_rank: int = 0
    address: str = "localhost"
    port: int = 29500
    ranks_per_node: int = 1

    @property
    def size(self) -> int:
        return self.nodes * self.ranks_per_node


@entry_point
def main(arguments: Sequence[str]) -> int:
    """Run the ranks of this node; returns the exit status."""
    hold_back_signals()
    parser = argparse.ArgumentParser(
        prog="python -m megatron_vila.launch",
        usage="%(prog)s --nproc-per-node N [options] CONFIG [key=value ...] [--dry-run ...]",
        description="Start the ranks of this node.",
        epilog="CONFIG and all that is not listed here belongs to megatron_vila.train: python -m megatron_vila.train --help",
    )
    parser.add_argument("--nnodes", type=int, default=1, help="nodes of the run (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this node, from 0")
    parser.add_argument("--master-addr", default="localhost", help="host name or address of node 0")
    parser.add_argument("--master-port", type=int, default=29500, help="a free port of node 0; one node needs none")
    parser.add_argument("--nproc-per-node", type=int, required=True, help="ranks of this node, one for each GPU")
    options, rest = parser.parse_known_args(arguments)
    if options.nnodes < 1 or options.nproc_per_node < 1 or not 0 <= options.node_rank < options.nnodes:
        parser.error(
            f"--nnodes {options.nnodes} --node-rank {options.node_rank} --nproc-per-node {options.nproc_per_node} describe no "
            "node of a run; sizes are at least 1, nodes are numbered from 0"
        )
    world = World(options.nnodes, options.node_rank, options.master_addr, options.master_port, options.nproc_per_node)
    # Each rank would take all cores for its operators on the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, (os.cpu_count() or 1) // world.ranks_per_node))))
    # Megatron-Core: kernels must start in the order of their calls for tensor-parallel communication to overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as train.py; its ranks import torch before that
    from megatron_vila import train

    given = train.parse(rest)
    if given.dry_run:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        return train.main(rest if given.world_size is not None else [*rest, "--world-size", str(world.size)])
    return launch(world, train_rank, rest)


def hold_back_signals() -> None:
    """Block ``asking()`` in this thread, and so in all threads and processes that it starts: what comes stays pending until
    someone is there to act on it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, asking())


def train_rank(arguments: list[str]) -> int:
    """One rank: the exit status of ``megatron_vila.train``, which lets SIGTERM through when it can act on it."""
    # Ctrl-C ends a rank that is still importing. Not by an exception: torchrun's agent would take that for an end without a
    # status, and wait for one.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    from megatron_vila import train

    status = train.main(arguments)
    if status not in (FINISHED, STOPPED):
        train.leave(status)  # torchrun's agent ends the other ranks
    # All is done, and SIGTERM ignored: torchrun's agent now has this process wait until it has read the status.
    parent.end_with_parent(signal.SIGKILL)
    return status


def launch(world: World, rank: Worker, arguments: list[str], start_method: str = "spawn") -> int:
    """Run ``rank(arguments)`` in every rank of this node; returns the exit status. ``asking()`` must be blocked.

    ``rank`` returns FINISHED or STOPPED, or ends its process with another status: the other ranks then have 30 s to end.
    """
    forwarder = _Forwarder()
    forwarder.start()
    for number in asking():
        # Threads from before this program may have a signal unblocked: then Python gets it, and hands it on.
        signal.signal(number, lambda number, _: signal.pthread_kill(forwarder.ident or 0, number))
    # Python's tracker of shared memory lets signals through in the thread that starts it: before the ranks, not between them.
    resource_tracker.ensure_running()
    hold_back_signals()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent reports a failed rank with tracebacks of its own; `_reason` says the same in a line.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")) and isinstance(logger, logging.Logger):
            logger.setLevel(logging.CRITICAL)
    alone = world.nodes == 1
    config = LaunchConfig(
        min_nodes=world.nodes,
        max_nodes=world.nodes,
        nproc_per_node=world.ranks_per_node,
        run_id=str(uuid.uuid4()) if alone else "megatron_vila",
        rdzv_backend="c10d" if alone else "static",
        # One node takes any free port, so that two runs do not meet.
        rdzv_endpoint="localhost:0" if alone else f"{world.address}:{world.port}",
        rdzv_configs={"timeout": 900} if alone else {"timeout": 900, "rank": world.node_rank},
        local_addr="localhost" if alone else None,
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method,
        signals_to_handle="SIGQUIT",
    )
    try:
        outcome = set(elastic_launch(config, _flushed)(rank, arguments).values())
    except ChildFailedError as error:
        return _failed(error.failures)
    except SignalException as error:
        tell(f"megatron_vila: ended by {error.sigval.name}; what was saved before is intact")
        return 128 + error.sigval
    return STOPPED if STOPPED in outcome else FINISHED


def _flushed(rank: Worker, arguments: list[str]) -> int:
    """``rank(arguments)``; multiprocessing would make a failure of an output that takes no more."""
    status = rank(arguments)
    flush_streams()
    return status


class _Forwarder(threading.Thread):
    """Takes the signals of this process and hands one SIGTERM on to each rank, also to those that start later."""

    def __init__(self) -> None:
        super().__init__(name="signals", daemon=True)

    def run(self) -> None:
        signal.sigwait(asking())
        told: set[int | None] = set()
        while True:
            for process in multiprocessing.active_children():
                if process.pid is not None and process.pid not in told:
                    told.add(process.pid)
                    os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.1)


def _failed(failures: dict) -> int:
    """Says why the first rank failed, unless it did so itself; returns the exit status."""
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    code = failure.exitcode
    if code == INTERRUPTED:
        tell(f"{interrupts.TOLD}; what was saved before is intact")
    if code in (USER_ERROR, INTERRUPTED):
        return code
    how = f"ended with status {code}; its error stands above"
    recorded = failure.message["extraInfo"] if isinstance(failure.message, dict) else {}
    if "first" in recorded:  # by ``failing/failures.py``, which has told it, maybe on another node
        first = "" if recorded["is_first"] else f"{recorded['first']}; "
        tell(f"megatron_vila: {first}the run ends, and the same command continues from the last checkpoint")
        return FAILED
    if code < 0:
        name = signal.Signals(-code).name
        how = f"was killed by {name}"
        if -code == signal.SIGKILL:
            how += " (often for want of host memory: see dmesg or the batch system's report)"
    tell(
        f"megatron_vila: rank {rank} on {os.uname().nodename} {how}; the run ends, and the same command continues from the last "
        "checkpoint"
    )
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

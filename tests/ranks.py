"""A pool of real processes (gloo, or NCCL where there are GPUs) kept alive over many tests: ``pool.run(world_size, fn, *args)``.

Each run forms a default process group of exactly ``world_size`` ranks, so a test sees what ``torchrun`` would give it,
without paying for process start and imports each time.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

TIMEOUT_S = 180


class RankFailure(AssertionError):
    """A rank raised; the text holds its traceback."""


def _serve(rank: int, port: int, pipe: Connection) -> None:
    # A rank that waits in a collective must not outlive an interrupted test run (PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # A forked rank would have pytest's handlers, and so none of those that a command sets up.
    logging.root.handlers.clear()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    from megatron_vila import accelerator, processes

    accelerator.prepare()
    if torch.cuda.is_available() and rank < torch.cuda.device_count():
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while (job := pipe.recv()) is not None:
        number, world_size, fn, args = job
        shared, timeout = dist.PrefixStore(f"run{number}", store), datetime.timedelta(seconds=TIMEOUT_S)
        try:
            dist.init_process_group(processes.backend(), store=shared, rank=rank, world_size=world_size, timeout=timeout)
            # A rank whose job is over at once would close connections that another one is still making.
            shared.set(f"connected/{rank}", "")
            shared.wait([f"connected/{other}" for other in range(world_size)], timeout)
            result = (True, fn(rank, *args))
        except BaseException:
            result = (False, f"rank {rank}:\n{traceback.format_exc()}")
        try:
            if dist.is_initialized():
                processes.end_distributed()
            pipe.send(result)
        except BaseException:
            pipe.send((False, f"rank {rank} at the end:\n{traceback.format_exc()}"))


class RankPool:
    """Processes are started when first needed and ended by ``close``; a failed run restarts them."""

    def __init__(self) -> None:
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []
        self._store: dist.TCPStore | None = None
        self._runs = 0

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``fn(rank, *args)`` on ``world_size`` ranks; returns the results in rank order.

        ``fn`` must be importable (a module-level function). Raises ``RankFailure`` with the first traceback.
        """
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        # A tool that runs many small groups of tests forks the ranks, which saves their imports.
        context = mp.get_context(os.environ.get("MEGATRON_VILA_TEST_RANKS", "spawn"))
        while len(self._workers) < world_size:
            here, there = context.Pipe()
            rank = len(self._workers)
            process = context.Process(target=_serve, args=(rank, self._store.port, there), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        self._runs += 1
        team = self._workers[:world_size]
        for _, pipe in team:
            pipe.send((self._runs, world_size, fn, args))
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(team)}
        while pipes:
            for pipe in wait(list(pipes), timeout=TIMEOUT_S + 60) or self._fail("no rank answered in time"):
                rank = pipes.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                if not ok:
                    self._fail(value)
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def _fail(self, message: str) -> None:
        self.close()
        raise RankFailure(message)

    def close(self) -> None:
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


pool = RankPool()

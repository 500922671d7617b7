"""Runs of the trainer whose ranks are forked from one warm process: real processes, signals and sockets without the imports.

``Zygote`` is that process: it has imported everything, has no thread and no process group. For each run it forks a launcher that
stands for torchrun (it keeps the store, and ends the others when one rank has failed), and that forks the ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing as mp
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

GRACE_S = 2.0
"""what the launcher leaves other ranks after a SIGTERM; torchrun's own default is 30"""


@dataclass(frozen=True)
class Run:
    """A run in work: its launcher, its ranks and the file of what they say."""

    launcher: int
    ranks: tuple[int, ...]
    log: Path

    def alive(self) -> list[int]:
        return [pid for pid in (self.launcher, *self.ranks) if _is_alive(pid)]

    def ends_within(self, seconds: float) -> bool:
        """Whether launcher and ranks all end in that time."""
        end = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        for pid in (self.launcher, *self.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Zygote:
    """Starts runs, for several threads if need be; use it as a context manager."""

    def __enter__(self) -> Zygote:
        self._lock = threading.Lock()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as train.py; read when torch is imported
        here, there = mp.Pipe()
        self._pipe = here
        self._process = mp.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()
        assert self._pipe.recv() == "ready"
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.join()

    def start(
        self, arguments: Sequence[str], world: int, log: Path, by_hand: bool = False, stops: tuple[int, str] | None = None
    ) -> Run:
        """Start ``python -m megatron_vila.train`` with ``arguments`` on ``world`` ranks; what they say is appended to ``log``.

        ``by_hand`` starts one process as a shell would, without the environment of a launcher. ``stops`` is a rank and where it
        gets a SIGSTOP: ``file.py:function``, at its first call.
        """
        launcher, ranks = self._ask("start", list(arguments), world, str(log), by_hand, stops)
        return Run(launcher, tuple(ranks), log)

    def status(self, run: Run) -> int:
        """Exit code of a run's launcher that has ended, minus the number of the signal that killed it."""
        return self._ask("status", run.launcher)

    def _ask(self, *question: object) -> Any:
        with self._lock:
            self._pipe.send(question)
            return self._pipe.recv()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _serve(pipe: Connection) -> None:
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    import torch

    from megatron_vila import accelerator

    torch.set_num_threads(1)
    accelerator.prepare()
    import transformers  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import megatron_vila.failing.failures
    import megatron_vila.train
    import megatron_vila.training.event_file
    import megatron_vila.training.plots
    import megatron_vila.training.trainer  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    # A collection writes to every object: each rank would copy all that was imported here, for seconds.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    pipe.send("ready")
    ended: dict[int, int] = {}
    while True:
        try:
            kind, *details = pipe.recv()
        except EOFError:
            return
        if kind == "start":
            arguments, world, log, by_hand, stops = details
            reader, writer = os.pipe()
            launcher = os.fork()
            if launcher == 0:
                os.close(reader)
                pipe.close()
                _launch(arguments, world, log, writer, by_hand, stops)
            os.close(writer)
            ended.pop(launcher, None)  # the number of a process that ended long ago
            with os.fdopen(reader) as told:
                pipe.send((launcher, [int(pid) for pid in told.read().split()]))
        else:
            (launcher,) = details
            if launcher not in ended:
                ended[launcher] = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
            pipe.send(ended[launcher])


def _launch(
    arguments: list[str], world: int, log: str, writer: int, by_hand: bool, stops: tuple[int, str] | None
) -> None:
    """The launcher: forks the ranks, keeps the store, ends with 0, 75 or 1."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Bound before the ranks are there: nobody else can take the port meanwhile. The store's threads come after the forks.
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listening.getsockname()[1]
    launched = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "endure", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    os.environ.update({} if by_hand else launched)
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            listening.close()
            if stops is not None and stops[0] == rank:
                _stop_at(*stops[1].split(":"))
            _rank(arguments, rank)
        ranks.append(pid)
    os.write(writer, " ".join(map(str, ranks)).encode())
    os.close(writer)
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    statuses, ending = {}, None
    while len(statuses) < world:
        for pid in set(ranks) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if ending is None and any(statuses.values()):
            ending = now
            _signal(set(ranks) - statuses.keys(), signal.SIGTERM)
        if ending is not None and now > ending + GRACE_S:
            _signal(set(ranks) - statuses.keys(), signal.SIGKILL)
        time.sleep(0.01)
    del store
    codes = set(statuses.values())
    print(f"launcher: ranks ended with {list(statuses.values())}", flush=True)
    os._exit(codes.pop() if len(codes) == 1 and codes <= {0, 2, 75} else 1)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _stop_at(file: str, function: str) -> None:
    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == function and frame.f_code.co_filename.endswith(f"/{file}"):
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.setprofile(look)


def _rank(arguments: list[str], rank: int) -> None:
    from megatron_vila import parent, train

    parent.PARENT_AT_START = os.getppid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["megatron_vila.train", *arguments]
    try:
        train.leave(train.main(arguments, atexit._run_exitfuncs))
    except SystemExit as end:  # of the command line
        train.leave(end.code)

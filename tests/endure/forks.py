"""Runs of the trainer whose ranks are forked from one warm process: real processes, signals and sockets without the imports.

``Zygote`` is that process: it has imported everything, has no thread and no process group. For each run it forks a launcher that
stands for torchrun (it keeps the store, and ends the others when one rank has failed), and that forks the ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

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
    """Starts runs; use it as a context manager."""

    def __enter__(self) -> Zygote:
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

    def start(self, arguments: Sequence[str], world: int, log: Path, by_hand: bool = False) -> Run:
        """Start ``python -m megatron_vila.train`` with ``arguments`` on ``world`` ranks; what they say is appended to ``log``.

        ``by_hand`` starts one process as a shell would, without the environment of a launcher.
        """
        self._pipe.send(("start", list(arguments), world, str(log), by_hand))
        launcher, ranks = self._pipe.recv()
        return Run(launcher, tuple(ranks), log)

    def status(self, run: Run) -> int:
        """Exit code of a run's launcher that has ended, minus the number of the signal that killed it."""
        self._pipe.send(("status", run.launcher))
        return self._pipe.recv()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _serve(pipe: Connection) -> None:
    for name, value in (("GLOO_SOCKET_IFNAME", "lo"), ("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ[name] = value
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from megatron_vila import platform

    torch.set_num_threads(1)
    platform.prepare()
    import transformers  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import megatron_vila.train
    import megatron_vila.training.event_file
    import megatron_vila.training.failures
    import megatron_vila.training.plots
    import megatron_vila.training.trainer  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"
    pipe.send("ready")
    ended: dict[int, int] = {}
    while True:
        try:
            kind, *details = pipe.recv()
        except EOFError:
            return
        if kind == "start":
            arguments, world, log, by_hand = details
            reader, writer = os.pipe()
            launcher = os.fork()
            if launcher == 0:
                os.close(reader)
                pipe.close()
                _launch(arguments, world, log, writer, by_hand)
            os.close(writer)
            with os.fdopen(reader) as told:
                pipe.send((launcher, [int(pid) for pid in told.read().split()]))
        else:
            (launcher,) = details
            if launcher not in ended:
                ended[launcher] = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
            pipe.send(ended[launcher])


def _launch(arguments: list[str], world: int, log: str, writer: int, by_hand: bool) -> None:
    """The launcher: forks the ranks, keeps the store, ends with 0, 75 or 1."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
            _rank(arguments, rank)
        ranks.append(pid)
    os.write(writer, " ".join(map(str, ranks)).encode())
    os.close(writer)
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
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


def _rank(arguments: list[str], rank: int) -> None:
    from megatron_vila import parent, train

    parent.PARENT_AT_START = os.getppid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["megatron_vila.train", *arguments]
    try:
        train.leave(train.main(arguments))
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)

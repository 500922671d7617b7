"""Launchers for tests, forked off one process that has imported what they need: real agents, real ranks, no imports to wait for.

``python -m tests.launched`` reads jobs, one JSON object a line, and answers with the process id of a launcher that leads a
session of its own. The ranks stand in for the trainer: they follow its protocol of signals and exit codes, and train nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_vila import launch, parent, train
from megatron_vila.exit_codes import FAILED, FINISHED, STOPPED, USER_ERROR
from megatron_vila.training.stop import StopRequest

SAVE_S = 0.3
PATIENCE_S = 100


def trains(arguments: list[str]) -> int:
    """Runs until it is told to stop, then saves: ``importing``, ``up`` and ``saved`` appear in the folder ``arguments[0]``."""
    folder, imports_s = arguments
    _note(folder, "importing")
    time.sleep(float(imports_s))
    stop = StopRequest()
    stop.install()
    _note(folder, "up")
    while not stop.signal:
        time.sleep(0.02)
    time.sleep(SAVE_S)
    _note(folder, "saved")
    stop.ignore_further()
    return STOPPED


def finishes(arguments: list[str]) -> int:
    return FINISHED


def refuses(arguments: list[str]) -> int:
    """Rank 1 ends as the trainer does after a message of its own; rank 0 would run forever."""
    if os.environ["RANK"] == "0":
        trains(arguments)
    os._exit(USER_ERROR)


def is_hung_up_on(arguments: list[str]) -> int:
    """As ``trains``; its launcher and all ranks ignore SIGHUP, as under nohup (``_lead``)."""
    return trains(arguments)


def ends_as_a_trainer(arguments: list[str]) -> int:
    """What a real rank does around its training."""
    parent.PARENT_AT_START = os.getppid()  # a fork has imported it elsewhere
    train.main = trains
    return launch.train_rank(arguments)


def is_interrupted_before_it_begins(arguments: list[str]) -> int:
    """Ctrl-C while Python still starts the rank: the signal is blocked until the rank lets it through."""
    os.kill(os.getpid(), signal.SIGINT)
    return ends_as_a_trainer(arguments)


def prints_to_a_full_disk(arguments: list[str]) -> int:
    sys.stdout = open("/dev/full", "w")  # noqa: SIM115 (as at the end of a real rank)
    print("a line that stays in the buffer")
    return FINISHED


def is_killed(arguments: list[str]) -> int:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    trains(arguments)
    os._exit(FAILED)


def _note(folder: str, what: str) -> None:
    (Path(folder) / f"{what}-{os.environ['RANK']}").write_text(str(os.getpid()))


def _status(leader: int) -> int:
    """How the leader ended; one that hangs is killed, with all its ranks."""
    end = time.monotonic() + PATIENCE_S
    while True:
        ended, status = os.waitpid(leader, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(leader, signal.SIGKILL)
        time.sleep(0.02)


def _lead(job: dict) -> int:
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Whatever started the tests: they may themselves run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if job["rank"] == "is_hung_up_on" else signal.SIG_DFL)
    launch.hold_back_signals()
    Path(job["log"]).with_suffix(".held").touch()
    time.sleep(job["imports_s"])
    world = launch.World(**job["world"])
    return launch.launch(world, globals()[job["rank"]], job["arguments"], start_method="fork")


def _serve() -> None:
    import torch.distributed.launcher.api  # noqa: F401 (the forks have it then)

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(_status(job["wait"]), flush=True)
            continue
        pid = os.fork()
        if not pid:
            sys.stdin.close()
            status = 99
            try:
                status = _lead(job)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()

"""Where the processes of a run meet."""

import os
import socket
import subprocess
import sys

MEET = "from megatron_vila import processes; processes.meet(0.02, '--timeout-minutes')"


def test_a_process_that_nobody_joins_says_who_is_missing_and_which_setting_is_the_limit():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        first = free.getsockname()[1]
    started = []
    for rank in (0, 1):  # each waits for the other at another place
        place = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first + rank)}
        command = [sys.executable, "-W", "ignore", "-c", MEET]
        started.append(subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1].strip().splitlines()[-1] for process in started]
    limit = "has not come to the start within --timeout-minutes=0.02"
    assert f"StallError: another rank {limit}" in said[0]
    assert f"StallError: rank 0 (127.0.0.1:{first + 1}) {limit}" in said[1]

"""The training command on ranks of the pool, as users start it: its exit status, and what it says."""

import contextlib
import io
import logging
import os
import signal

from megatron_vila import accelerator
from megatron_vila.plan.bounds import MOST
from megatron_vila.train import main
from megatron_vila.training.stop import ASKING
from tests.ranks import pool
from tests.training.real_run import Layout


def command_on_rank(rank: int, world: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command on this rank."""
    out, err = io.StringIO(), io.StringIO()
    level = logging.getLogger("megatron_vila").level
    handlers = {asking: signal.getsignal(asking) for asking in ASKING}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    # Rates that give numbers which are not finite are refused: here it is tested what guards a run when they come all the same.
    MOST.update({"optim.lr": 1e300, "optim.vision.lr": 1e300})
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        for asking, handler in handlers.items():
            signal.signal(asking, handler)
        logging.root.handlers.clear()
        logging.getLogger("megatron_vila").setLevel(level)
        logging.getLogger("megatron_vila.data").setLevel(logging.NOTSET)
        accelerator.set_deterministic(False)
    return status, out.getvalue(), err.getvalue()


def run_command(layout: Layout, arguments: list[str]) -> tuple[int, str, str]:
    """The command on all ranks: its status, the same on each, and everything said by any."""
    ranks = pool.run(layout.world, command_on_rank, layout.world, ["tiny", *arguments, *layout.overrides()])
    (status,) = {status for status, _, _ in ranks}
    return status, "".join(out for _, out, _ in ranks), "".join(err for _, _, err in ranks)


def refused(layout: Layout, arguments: list[str], *words: str) -> str:
    """The one message that the command ends with, on one rank; it holds ``words``."""
    status, _, err = run_command(layout, arguments)
    assert status == 2, err
    assert err.count("megatron_vila: ") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    return err


def dry_run(arguments: list[str], *options: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of a dry run."""
    return pool.run(1, command_on_rank, 1, ["tiny", *arguments, "--dry-run", *options])[0]

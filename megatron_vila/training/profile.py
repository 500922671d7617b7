"""Chrome traces of chosen steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_vila.config.schema import ProfileConfig
from megatron_vila.training.report_files import Reporting


@contextmanager
def traced(settings: ProfileConfig, step: int, rank: int, output: str) -> Iterator[None]:
    """Write what happens inside to ``output``/traces/step-N-rank-R.json.gz if ``settings`` name this step and rank.

    The file opens in ui.perfetto.dev or chrome://tracing: operators, kernels with their streams, and collectives.
    """
    if step not in settings.steps or rank not in settings.ranks:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as trace:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    path = Path(output) / "traces" / f"step-{step:06d}-rank-{rank}.json.gz"
    Reporting().attempt(str(path), lambda: _export(trace, path))


def _export(trace: profile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))

"""Shared fixtures."""

import json
import os
from collections import Counter
from itertools import chain
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# The suite is a CPU suite everywhere; the GPU tests are a run of their own.
ON_GPUS = os.environ.get("MEGATRON_VILA_TEST_GPU") == "1"
if ON_GPUS:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # some repeat bit by bit
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch

from megatron_vila import accelerator
from tests.ranks import pool

torch.set_num_threads(1)
accelerator.prepare()


@pytest.fixture(scope="session", autouse=True)
def _close_the_rank_pool():
    yield
    pool.close()


def pytest_addoption(parser):
    parser.addoption("--by-area", action="store_true", help="end with a table of areas, tests and seconds (in all processes)")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("by_area"):
        return
    tests, seconds = Counter(), Counter()
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            file = Path(report.nodeid.partition("::")[0])
            area = str(file if file.parent == Path("tests") else file.parent)
            seconds[area] += report.duration
            tests[area] += report.when == "call"
    terminalreporter.write_line("\n| area | tests | seconds |\n|---|---|---|")
    for area in sorted(seconds):
        terminalreporter.write_line(f"| `{area}` | {tests[area]} | {seconds[area]:.0f} |")


def pytest_collection_modifyitems(config, items):
    if ON_GPUS:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("gpu")])
        items[:] = [item for item in items if item.get_closest_marker("gpu")]


@pytest.fixture
def data_folder(tmp_path) -> list[str]:
    """Overrides that name files which exist, for what validates them."""
    samples, tokenizer, media = tmp_path / "train.json", tmp_path / "tokenizer", tmp_path / "media"
    samples.write_text(json.dumps([{"conversations": []}]))
    tokenizer.mkdir()
    media.mkdir()
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    return [
        f"data.train=[{samples}]",
        f"data.media_dir={media}",
        f"data.tokenizer={tokenizer}",
        f"train.output={tmp_path / 'runs' / 'new'}",
    ]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of small real video files with questions, and a tokenizer, for what runs the trainer; do not write to it."""
    from tests.training.real_run import write_videos

    return write_videos(tmp_path_factory.mktemp("videos"))

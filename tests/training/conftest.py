"""Fixtures of the tests that run the trainer."""

from pathlib import Path

import pytest

from tests.training.real_run import write_videos


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder of small real video files with questions, and a tokenizer; do not write to it."""
    return write_videos(tmp_path_factory.mktemp("videos"))

import pytest

from tests.generate import material
from tests.ranks import pool


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A folder with files to ask about (``material.make_files``) and a run of one rank, ``run/``."""
    folder = tmp_path_factory.mktemp("generate")
    material.make_files(folder)
    pool.run(1, material.save_run, str(folder), (1, 1, 1, 1))
    return folder

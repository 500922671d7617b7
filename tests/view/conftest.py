import pytest

from tests.view.material import write_set


@pytest.fixture(scope="session")
def shown_set(tmp_path_factory):
    """A folder with a small set, made once; do not write to it."""
    return write_set(tmp_path_factory.mktemp("shown"))

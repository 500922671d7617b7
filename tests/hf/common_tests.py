"""transformers' own common tests: ``common("test_modeling_common")``, of the source distribution of the installed version.

The wheel has no tests. The source distribution is fetched once, by the pip of this environment, and its ``tests`` are kept
in the cache of this user; nothing of them is in this repository. What the distribution lacks (the tests of ``generate`` and of
exporters, a table of configurations, a downloader) is replaced by empty classes, unless
``MEGATRON_VILA_TRANSFORMERS_SOURCE`` names a folder of transformers' sources that has it.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
import transformers

from megatron_vila.data.kept import kept_folder

_PACKAGE = "transformers_common_tests"
_EXPORTERS = {name: type(name, (), {}) for name in ("ExportTesterMixin", "ExportGenerateTesterMixin")}
_LACKING = {
    f"{_PACKAGE}.exporters.test_export": _EXPORTERS,
    "tests.exporters.test_export": _EXPORTERS,
    f"{_PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{_PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda address: address},
}


def common(name: str) -> types.ModuleType:
    """The module ``name`` of transformers' tests. Skips the module that asks for it if the tests cannot be had."""
    pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")
    if _PACKAGE not in sys.modules:
        _provide(_source())
    return importlib.import_module(f"{_PACKAGE}.{name}")


def lacks(module: str) -> bool:
    """Whether a module of transformers' tests is one of the empty stand-ins."""
    return not hasattr(sys.modules[f"{_PACKAGE}.{module}"], "__file__")


def _source() -> Path:
    """A folder with transformers' ``tests``."""
    if given := os.environ.get("MEGATRON_VILA_TRANSFORMERS_SOURCE"):
        return Path(given)
    kept = kept_folder("transformers_tests")
    if kept is None:
        pytest.skip("there is no home folder to keep transformers' tests in", allow_module_level=True)
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = kept / f"transformers-{transformers.__version__}"
    with open(kept / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=kept) as scratch:
                _unpack(_download(Path(scratch)), Path(scratch) / "unpacked")
                (Path(scratch) / "unpacked" / folder.name).rename(folder)
    return folder


def _download(folder: Path) -> Path:
    wanted = f"transformers=={transformers.__version__}"
    options = ["--quiet", "--no-deps", "--no-binary=:all:", "--retries=0", "--timeout=20", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True)
    if done.returncode:
        reason = f"the source distribution of {wanted} cannot be fetched, which holds transformers' common tests: "
        pytest.skip(reason + done.stderr.strip().rpartition("\n")[2], allow_module_level=True)
    return next(folder.glob("*.tar.gz"))


def _unpack(archive: Path, folder: Path) -> None:
    """The tests in ``archive``, as a package."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, [m for m in content if m.name.startswith(f"{root}/tests/")], filter="data")
    (folder / root / "tests" / "__init__.py").touch()


def _provide(source: Path) -> None:
    """Make the package ``transformers_common_tests`` of ``source``, with what it lacks."""
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(source / "tests")]
    sys.modules[_PACKAGE] = package
    sys.path.append(str(source / "utils"))
    for name, content in _LACKING.items():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            for place in (name.rpartition(".")[0], name):
                if place and place not in sys.modules:
                    sys.modules[place] = types.ModuleType(place)
            vars(sys.modules[name]).update(content)

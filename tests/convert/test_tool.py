"""The way of a user: import with the tool, train, stop, go on, export with the tool, verify."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.start_checks import check_start
from megatron_vila.training.start import make_trainer
from tests.convert import material
from tests.convert.test_bad_input import edit
from tests.ranks import pool
from tests.training.real_run import environment, write_videos

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "convert_checkpoint.py"

STAGE_1 = [
    "optim.llm.trainable=false", "optim.vision.trainable=false", "optim.lr=1e-2", "optim.warmup_fraction=0",
    "train.global_batch_size=2", "train.seq_length=128", "data.num_frames=3", "data.workers=1", "parallel.tp=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder whose vocabulary is that of its tokenizer, and videos with questions."""
    folder = tmp_path_factory.mktemp("user")
    write_videos(folder)
    family = material.FAMILIES["longvila-1.5b"]
    llm = family["llm"] | {"vocab_size": 400}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(material.FAMILIES, "longvila-1.5b", family | {"llm": llm})
        material.write_vila(folder / "vila", "longvila-1.5b", tokenizer=folder / "tokenizer")
    return folder


def train(rank, path, overrides):
    config = load_config(path, overrides)
    check_start(config, 2, accelerator.machine())
    return make_trainer(config).run()


def test_from_a_published_folder_through_stage_1_and_back(tool, source, tmp_path, capsys):
    out = tmp_path / "imported"
    assert tool("import", source / "vila", out) == 0
    assert f"python -m megatron_vila.train {out / 'config.yaml'} data.train=[samples.json]" in capsys.readouterr().out
    settings = [*STAGE_1, f"data.train=[{source / 'train_3.json'}]"]
    pool.run(2, train, str(out / "config.yaml"), [*settings, "train.steps=1"])
    # Going on: the second checkpoint comes from a run that was resumed.
    pool.run(2, train, str(out / "config.yaml"), [*settings, "train.steps=2"])

    assert tool("export", out / "run", tmp_path / "exported", "--dtype", "bf16") == 0
    before, after = material.read_tensors(source / "vila"), material.read_tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("mm_projector.") for name in moved)
    root = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert root["transformers_version"] == "4.44.2" and (root["tune_language_model"], root["tune_mm_projector"]) == (
        False,
        True,
    )
    assert json.loads((tmp_path / "exported/llm/generation_config.json").read_text())["temperature"] == 0.7
    assert (tmp_path / "exported/llm/tokenizer.json").is_file()

    capsys.readouterr()
    assert tool("verify", source / "vila", out) == 0
    assert capsys.readouterr().out.startswith("equal: ")
    assert tool("verify", source / "vila", tmp_path / "exported") == 1
    assert capsys.readouterr().out.startswith("different: ")


def test_problems_are_printed_as_a_message_with_status_2(source, tmp_path):
    broken = material.write_vila(tmp_path / "broken", "vila-1.5")
    edit(broken / "config.json", model_type="unheard_of")
    command = [sys.executable, "-W", "ignore", str(TOOL), "import", str(broken), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{broken} cannot be imported: 1 problem\n- {broken / 'config.json'}: model_type='unheard_of'" in done.stderr

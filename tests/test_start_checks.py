"""Validation of the file system: files and folders that are missing, empty or closed are refused."""

import os
from pathlib import Path

import pytest

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.errors import ConfigError
from megatron_vila.plan.hardware import UNNAMED
from megatron_vila.start_checks import check_data, check_start, tokenizer_problems


def checked(overrides: list[str]) -> list[str]:
    return check_start(load_config("tiny", overrides), 1, UNNAMED)


def files_refused(overrides: list[str], *changes: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        checked([*overrides, *changes])
    return str(caught.value).splitlines()[1:]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("data.train=[nowhere.json]", "data.train names 'nowhere.json', which does not exist"),
        ("data.eval=[nowhere.json]", "data.eval names 'nowhere.json', which does not exist"),
        ("data.train=[]", "data.train is empty"),
        ("data.media_dir=nowhere", "data.media_dir='nowhere' is not a folder"),
        ("data.tokenizer=", "data.tokenizer is empty"),
        ("data.tokenizer=nowhere", "data.tokenizer='nowhere' is not a folder"),
        ("checkpoint.load=nowhere", "checkpoint.load='nowhere' is not a folder"),
        ("train.output=~/runs", "train.output names '~/runs', and ~ does not stand for a folder here; write $HOME/"),
    ],
)
def test_a_missing_file_is_refused(data_folder, change, part):
    (message,) = files_refused(data_folder, change)
    assert part in message


def test_a_zero_byte_in_a_path_is_refused_by_a_run_and_by_the_check_of_data(data_folder):
    for name in ("data.train", "data.eval", "data.media_dir", "data.tokenizer", "checkpoint.load", "train.output"):
        path = "zero \0.json"
        config = load_config("tiny", data_folder)
        group, key = name.split(".")
        setattr(getattr(config, group), key, [path] if name in ("data.train", "data.eval") else path)
        problem = f"{name}={path!r} holds a zero byte; remove it"
        with pytest.raises(ConfigError) as caught:
            check_start(config, 1, UNNAMED)
        assert problem in str(caught.value)
        if name.startswith("data."):
            with pytest.raises(ConfigError) as caught:
                check_data(config)
            assert problem in str(caught.value)


def test_an_empty_sample_file_and_a_folder_in_its_place_are_refused(data_folder, tmp_path):
    (tmp_path / "empty.json").touch()
    messages = files_refused(data_folder, f"data.train=[{tmp_path / 'empty.json'},{tmp_path}]")
    assert "which is empty" in messages[0]
    assert "a folder without .nv-meta or wids-meta.json" in messages[1]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (message,) = tokenizer_problems(str(tmp_path), "")
    assert "has no chat template" in message
    assert list(tokenizer_problems(str(tmp_path), "llama_3")) == []
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert list(tokenizer_problems(str(tmp_path), "")) == []


def test_an_output_below_a_file_is_refused(data_folder, tmp_path):
    (message,) = files_refused(data_folder, f"train.output={tmp_path / 'train.json' / 'run'}")
    assert "is a file; choose another folder" in message
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (message,) = files_refused(data_folder, f"train.output={tmp_path / 'link'}")
    assert "is a link to what is not there; choose another folder" in message


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/nowhere/scratch")], ids=["file", "broken link"])
def test_an_output_whose_checkpoints_have_no_folder_is_refused_before_a_step_is_made(data_folder, tmp_path, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run/checkpoints")
    (message,) = files_refused(data_folder, f"train.output={tmp_path / 'run'}")
    assert message.endswith("run/checkpoints' is not a folder; remove it or choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission_is_refused(data_folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (message,) = files_refused(data_folder, f"train.output={closed / 'run'}")
    assert "no permission" in message


def test_a_folder_that_holds_no_checkpoint_cannot_be_started_from(data_folder, tmp_path):
    (message,) = files_refused(data_folder, f"checkpoint.load={tmp_path}")
    assert f"checkpoint.load='{tmp_path}' holds no finished checkpoint; give the folder of a step" in message


@pytest.mark.parametrize("output", ["", " "])
def test_an_empty_output_is_refused(data_folder, output):
    (message,) = files_refused(data_folder, f"train.output={output}")
    assert message == "- train.output is empty; name the folder that checkpoints, metrics and plots go to"


def test_evaluations_without_held_out_samples_are_warned_about(data_folder):
    (warning,) = checked([*data_folder, "train.eval_every=5"])
    assert warning == "train.eval_every=5, but data.eval is empty: nothing is evaluated"


def test_the_output_folder_is_not_made_by_validation(data_folder, tmp_path):
    checked(data_folder)
    assert not (tmp_path / "runs").exists()


def test_problems_of_values_and_of_files_come_together(data_folder):
    assert len(files_refused(data_folder, "data.train=[nowhere.json]", "parallel.pp=3")) >= 2


def test_the_default_configuration_lacks_only_data():
    with pytest.raises(ConfigError) as caught:
        check_start(Config(), 1, UNNAMED)
    assert [line[2:].split(" ")[0] for line in str(caught.value).splitlines()[1:]] == ["data.train", "data.tokenizer"]

"""Reading configurations: files, includes, overrides, and what the user is told when something is wrong."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_vila.config.keys import config_keys
from megatron_vila.config.load import describe_keys, dump_config, load_config
from megatron_vila.config.schema import Config
from megatron_vila.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def problems(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, list(overrides))
    return str(caught.value)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path / "run.yaml", ""), []) == Config()


def test_keys_of_a_file_are_set_and_all_others_keep_their_defaults(tmp_path):
    config = load_config(write(tmp_path / "run.yaml", "train:\n  steps: 7\n"), [])
    expected = Config()
    expected.train.steps = 7
    assert config == expected


def test_an_empty_section_sets_nothing(tmp_path):
    assert load_config(write(tmp_path / "run.yaml", "train:\ndata:\n"), []) == Config()


def test_later_includes_win_over_earlier_ones_and_the_file_wins_over_both(tmp_path):
    write(tmp_path / "a.yaml", "train: {steps: 1, seed: 1, log_every: 1}\n")
    write(tmp_path / "b.yaml", "train: {steps: 2, seed: 2}\n")
    run = write(tmp_path / "run.yaml", "train: {steps: 3}\ninclude: [a.yaml, b.yaml]\n")
    train = load_config(run, []).train
    assert (train.steps, train.seed, train.log_every) == (3, 2, 1)


def test_an_include_is_relative_to_its_file_and_may_include_again(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    write(folder / "inner.yaml", "train: {steps: 5}\n")
    write(folder / "outer.yaml", "include: [inner.yaml]\n")
    run = write(tmp_path / "run.yaml", "include: [sub/outer.yaml]\n")
    assert load_config(run, []).train.steps == 5


def test_an_include_on_the_command_line_wins_over_the_file_and_loses_to_every_other_override(tmp_path):
    run = write(tmp_path / "run.yaml", "include: [stages/stage4]\ntrain: {steps: 5}\n")
    config = load_config(run, ["train.seq_length=7", "include=[stages/stage4, contexts/524288]"])
    assert (config.model.llm.max_positions, config.train.steps, config.train.seq_length) == (524288, 80, 7)


@pytest.mark.parametrize("value", ["rope/262144", "[3]", "[nowhere]", "[", ""])
def test_an_include_on_the_command_line_that_is_no_list_of_files_is_refused(value):
    with pytest.raises(ConfigError, match="^command line: include"):
        load_config("tiny", [f"include={value}"])


def test_a_preset_is_included_by_its_name(tmp_path):
    run = write(tmp_path / "run.yaml", "include: [models/qwen2-7b]\ntrain: {steps: 5}\n")
    config = load_config(run, [])
    assert (config.model.llm.num_heads, config.train.steps) == (28, 5)


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    run = write(tmp_path / "run.yaml", "parallel: {tp: 2, pp: 2}\n")
    config = load_config(run, ["parallel.tp=4", "parallel.tp=8"])
    assert (config.parallel.tp, config.parallel.pp) == (8, 2)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=2e-5", 2e-5),
        ("optim.lr=1", 1.0),
        ("optim.vision.lr=null", None),
        ("optim.vision.lr=1e-6", 1e-6),
        ("model.llm.head_dim=64", 64),
        ("train.deterministic=true", True),
        ("data.train=[a.json,b c.jsonl]", ["a.json", "b c.jsonl"]),
        ("data.frame_separator_ids=[198]", [198]),
        ("data.train=[]", []),
        ("train.output=2024", "2024"),
        ("train.output=runs/a=b", "runs/a=b"),
        ("data.media_dir=", ""),
    ],
)
def test_an_override_is_read_as_the_type_of_its_key(override, value):
    config = load_config("tiny", [override])
    target = config
    for part in override.split("=")[0].split("."):
        target = getattr(target, part)
    assert target == value
    assert type(target) is type(value)


def test_yaml_numbers_in_exponent_form_are_numbers(tmp_path):
    assert load_config(write(tmp_path / "run.yaml", "optim: {lr: 2e-5, min_lr: 0}\n"), []).optim.lr == 2e-5


def test_an_environment_variable_stands_in_a_value(tmp_path, monkeypatch):
    monkeypatch.setenv("VILA_TEST_DATA", "/somewhere")
    run = write(tmp_path / "run.yaml", "data: {media_dir: '${oc.env:VILA_TEST_DATA}/videos'}\n")
    assert load_config(run, []).data.media_dir == "/somewhere/videos"


def test_two_configurations_share_no_list():
    first = load_config("tiny", [])
    first.data.train.append("x.json")
    assert load_config("tiny", []).data.train == []


def test_an_unknown_key_is_named_with_its_file_and_the_closest_key(tmp_path):
    run = write(tmp_path / "run.yaml", "train:\n  stps: 7\n")
    assert problems(run) == f"{run}: unknown key 'train.stps'; did you mean 'train.steps'?"


def test_an_unknown_key_in_an_included_file_is_blamed_on_that_file(tmp_path):
    write(tmp_path / "base.yaml", "trian: {steps: 7}\n")
    run = write(tmp_path / "run.yaml", "include: [base.yaml]\n")
    assert problems(run).startswith(f"{tmp_path / 'base.yaml'}: unknown key 'trian'")


@pytest.mark.parametrize(
    ("override", "proposed"),
    [("parallel.ulyses=2", "'parallel.ulysses'"), ("lr=1", "'optim.lr'"), ("--train.steps=3", "'train.steps'")],
)
def test_an_unknown_override_is_blamed_on_the_command_line(override, proposed):
    message = problems("tiny", override)
    assert message.startswith(f"command line: unknown key '{override.split('=')[0]}'; did you mean {proposed}")


def test_a_key_like_no_other_is_sent_to_the_documentation():
    assert "docs/configuration.md" in problems("tiny", "qqqqqq=1")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("parallel.tp=two", "parallel.tp is 'two', but must be a whole number"),
        ("parallel.tp=2.5", "parallel.tp is 2.5, but must be a whole number"),
        ("parallel.tp=true", "parallel.tp is True, but must be a whole number"),
        ("parallel.tp=", "parallel.tp is empty, but must be a whole number"),
        ("optim.lr=fast", "optim.lr is 'fast', but must be a number"),
        ("optim.vision.lr=fast", "optim.vision.lr is 'fast', but must be a number or null"),
        ("train.deterministic=1", "train.deterministic is 1, but must be true or false"),
        ("data.train=a.json", "must be a list of text; write data.train=[a.json]"),
        ("data.frame_separator_ids=[a]", "must be a list of whole numbers"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_wanted_type(override, wanted):
    assert wanted in problems("tiny", override)


def test_a_number_where_text_is_wanted_asks_for_quotes(tmp_path):
    run = write(tmp_path / "run.yaml", "train: {output: 5}\n")
    assert problems(run) == f"{run}: train.output is 5, but must be text; put it in quotes"


def test_a_group_of_keys_cannot_be_given_a_value(tmp_path):
    assert "'parallel' is a group of keys" in problems("tiny", "parallel=2")
    assert "'parallel' is a group of keys" in problems(write(tmp_path / "run.yaml", "parallel: 2\n"))


def test_an_override_without_a_value_is_refused():
    assert "'train.steps' must be written as key=value" in problems("tiny", "train.steps")


def test_all_problems_are_reported_at_once(tmp_path):
    run = write(tmp_path / "run.yaml", "train: {stps: 7, seed: x}\ninclude: [missing.yaml]\n")
    lines = problems(run, "parallel.zz=1", "parallel.tp=two").splitlines()
    assert len(lines) == 5


def test_a_missing_file_is_named():
    assert "no configuration file 'nowhere/run.yaml'" in problems("nowhere/run.yaml")


def test_a_name_like_a_preset_lists_the_presets():
    message = problems("longvila-7b-stage9")
    assert "did you mean 'longvila-7b-stage" in message
    assert "models/longvila-7b" in message


def test_a_folder_is_no_configuration(tmp_path):
    assert "is a folder" in problems(str(tmp_path))


def test_files_that_include_each_other_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "include: [b.yaml]\n")
    write(tmp_path / "b.yaml", "include: [a.yaml]\n")
    assert "include each other" in problems(str(tmp_path / "a.yaml"))


def test_an_include_that_is_no_list_is_refused(tmp_path):
    assert "must be a list of files or presets" in problems(write(tmp_path / "run.yaml", "include: models/tiny\n"))


@pytest.mark.parametrize(
    "text", ["train: [1\n", "- 1\n", "train: {steps: 1, steps: 2}\n", "a: !!python/object:os.system x\n"]
)
def test_a_file_that_is_no_mapping_of_keys_is_refused_with_its_name(tmp_path, text):
    run = write(tmp_path / "run.yaml", text)
    assert problems(run).startswith(run)


def test_an_unreadable_override_is_refused():
    assert "data.train=[a: cannot be read as YAML" in problems("tiny", "data.train=[a")


def test_a_dumped_configuration_loads_to_the_same(tmp_path):
    config = load_config(
        "longvila-7b-stage5", ["optim.vision.lr=1e-6", "data.train=[a.json]", "train.output='1'", "optim.lr=2e-5"]
    )
    assert load_config(write(tmp_path / "run.yaml", dump_config(config)), []) == config


def test_every_key_has_a_help_text():
    assert [key.name for key in config_keys() if not key.help.strip()] == []


def test_the_schema_walk_finds_every_leaf():
    def leaves(tree: dict, prefix: str = "") -> set[str]:
        found = set()
        for name, value in tree.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
        return found

    assert {key.name for key in config_keys()} == leaves(asdict(Config()))


def test_the_configuration_page_is_what_the_schema_says():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == describe_keys(), "write it anew: python -m megatron_vila.config > docs/configuration.md"


def test_the_configuration_page_names_every_key_with_its_default():
    page = describe_keys()
    for key in config_keys():
        assert f"| `{key.name}` |" in page
    assert "| `parallel.tp` | whole number | `1` |" in page
    assert "| `optim.vision.lr` | number or null | `null` |" in page


def test_the_module_prints_the_page():
    run = subprocess.run(
        [sys.executable, "-m", "megatron_vila.config"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout == describe_keys()

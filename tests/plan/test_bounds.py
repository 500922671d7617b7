"""Any key set to any value: the configuration passes, or is refused with the key, and never a traceback or an endless loop.

Every key of the schema takes part, also those that will come.
"""

import signal
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vila.config.keys import config_keys
from megatron_vila.config.load import load_config
from megatron_vila.errors import ConfigError
from megatron_vila.plan.bounds import LARGEST_NUMBER, LARGEST_WHOLE_NUMBER, MOST, MOST_RANKS, most, value_of
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.hardware import UNNAMED
from megatron_vila.plan.memory import describe_memory
from megatron_vila.plan.validate import validate
from megatron_vila.start_checks import check_start

KEYS = {key.name: key for key in config_keys()}
NUMBERS = {name: bound for name, key in KEYS.items() if (bound := most(name, key.type)) is not None}

ABSURD = [
    "", "null", "true", "[]", "[null]", "['']", "{a: 1}", "0", "-0.0", "-1", "1", "2", "3", "0.5", "1e-320", "1e30", "-1e30",
    "1e400", ".inf", "-.inf", ".nan", "-9223372036854775809", "100000000", "4294967296", "1" + "0" * 400, "1" + "0" * 5000,
    "0x7fffffff", "12:30:45", "2001-01-01", "many", "a/" * 3000, "x" * 300, "/dev/zero", "/", "${x}", "${", "[", "'", "*a",
    "!!python/name:os", "a\0b", "\ud800", "[1e30]", "[-1]", "[.nan]",
]  # fmt: skip


class EndlessError(BaseException):
    """No answer after seconds, so that a loop over a huge number fails a test instead of holding it."""


@contextmanager
def at_most(seconds):
    def stop(*_):
        raise EndlessError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module", autouse=True)
def nothing(tmp_path_factory):
    """A file without a key, which is read faster than a preset."""
    global EMPTY
    EMPTY = tmp_path_factory.mktemp("bounds") / "empty.yaml"
    EMPTY.write_text("{}")


def check(overrides):
    """What a dry run does with the settings: the whole validation and the estimate of memory."""
    config = load_config(str(EMPTY), overrides)
    world = Layout.of(config.parallel).size
    check_start(config, world, UNNAMED)
    describe_memory(config, world, UNNAMED)
    return config


def refused(overrides) -> str | None:
    """The message that ``overrides`` are refused with; None if they pass."""
    try:
        with at_most(20):
            check(overrides)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", KEYS)
def test_an_absurd_value_of_any_key_passes_or_is_refused_by_its_name(data_folder, name):
    for value in ABSURD:
        message = refused([*data_folder, f"{name}={value}"])
        assert message is None or name in message, (value, message)


@pytest.mark.parametrize("value", ["[" * 200 + "]" * 200, "[1" + ",1" * 5000 + "]", "{" * 200], ids=["deep", "long", "open"])
def test_values_that_are_deep_or_long_are_refused_in_a_line(data_folder, value):
    message = refused([*data_folder, f"optim.lr={value}"])
    assert "optim.lr" in message and len(message) < 1000


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_random_value_of_any_key_passes_or_is_refused_by_its_name(data_folder, data):
    name = data.draw(st.sampled_from(sorted(KEYS)))
    number = st.integers() | st.floats() | st.integers(-(2**70), 2**70)
    value = data.draw(number.map(str) | st.text(max_size=20) | st.lists(number, max_size=4).map(str) | st.sampled_from(ABSURD))
    message = refused([*data_folder, f"{name}={value}"])
    assert message is None or name in message, message


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_random_value_of_any_key_of_a_file_passes_or_is_refused_by_its_name(data_folder, tmp_path, data):
    import yaml

    name = data.draw(st.sampled_from(sorted(KEYS)))
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=8)
    group = st.dictionaries(st.text(max_size=3), leaf, max_size=2)
    value = data.draw(leaf | group | st.lists(leaf | group, max_size=3))
    for part in reversed(name.split(".")):
        value = {part: value}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"include": ["tiny"], **value}), encoding="utf-8")
    try:
        with at_most(20):
            # The file comes first: what it says of the key must hold against no override of the same name.
            kept = [text for text in data_folder if not text.startswith(f"{name}=")]
            config = load_config(str(tmp_path / "run.yaml"), kept)
            check_start(config, Layout.of(config.parallel).size, UNNAMED)
    except ConfigError as error:
        assert name in str(error) or name.rpartition(".")[0] in str(error), error


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_above_its_bound_is_refused_with_the_bound(name):
    """Also of a key that has no bound of its own: the general one holds."""
    value = NUMBERS[name] * 2
    message = refused([f"{name}={int(value) if value < 1e10 and float(value).is_integer() else value}"])
    assert f"{name}=" in message and "must be a mistake; use at most" in message, message


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.type in (float, float | None)])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_infinity_and_no_number_are_refused(name, value):
    message = refused([f"{name}={value}"])
    assert message is not None and f"{name}={float(value.replace('.', '', 1))}" in message


def test_every_bound_is_of_a_key_that_is_a_number():
    assert MOST.keys() <= NUMBERS.keys()
    assert all(bound <= LARGEST_WHOLE_NUMBER or bound <= LARGEST_NUMBER for bound in MOST.values())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.prefetch=1000000000", "data.prefetch=1000000000 must be a mistake; use at most 4096"),
        ("train.global_batch_size=100000000", "use at most 1000000"),
        ("optim.lr=1e30", "optim.lr=1e+30 must be a mistake; use at most 1"),
        ("train.steps=9223372036854775808", "train.steps=9223372036854775808 must be a mistake; use at most 1000000000"),
        ("parallel.ring=1000000007", "parallel.ring=1000000007 must be a mistake"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_most_that_can(setting, words):
    assert words in refused([setting])


def test_a_world_that_no_machine_has_is_refused_at_once():
    with pytest.raises(ConfigError, match=f"world size {10**12} must be a mistake; use at most {MOST_RANKS} ranks"), at_most(20):
        validate(load_config("tiny"), 10**12)


def test_a_world_at_the_bound_that_the_layout_does_not_divide_gets_its_proposals():
    with pytest.raises(ConfigError, match=r"start 1048575 processes|for 1048576 use"), at_most(20):
        validate(load_config("tiny", ["parallel.ring=3"]), MOST_RANKS)


@pytest.mark.parametrize("preset", ["tiny", "longvila-7b-stage5", "llama3-longvila-8b-stage5", "longvila-1.5b-stage1"])
def test_the_bounds_lie_far_above_what_is_trained(preset):
    config = load_config(preset)
    ours = {name: value_of(config, name) for name in NUMBERS}
    close = {name: value for name, value in ours.items() if value is not None and abs(value) * 4 > NUMBERS[name]}
    assert close.keys() <= {"optim.eps"}

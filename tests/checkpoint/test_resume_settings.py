"""Settings that change between a checkpoint and the run that continues from it are told, or refused where they make no sense."""

import re
from fnmatch import fnmatchcase

import pytest

from megatron_vila.checkpoint.resume import RULES, UNWATCHED, changes, kept_settings, other_text, settings_of
from megatron_vila.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_vila.config.keys import config_keys
from megatron_vila.config.load import load_config
from megatron_vila.data.synthetic import corpus
from megatron_vila.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from megatron_vila.errors import CheckpointError
from tests.checkpoint import test_damaged_checkpoint
from tests.ranks import pool
from tests.training.real_run import overrides, train
from tests.training.small_run import build

CHANGED = ("changed since", "warning: other than")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(), folder, 400)
    return folder


def settings(tokenizer, *more):
    return settings_of(load_config("tiny", [f"data.tokenizer={tokenizer}", "train.steps=100", *more]))


@pytest.mark.parametrize(
    "change, line",
    [
        ("train.steps=200", "train.steps: 100 -> 200: the run ends there, and learning rates that follow its length"),
        ("optim.lr=0.5", "optim.lr: .* -> 0.5: learning rates follow another schedule"),
        ("optim.vision.lr=0.5", "optim.vision.lr: .* -> 0.5: learning rates follow another schedule"),
        ("optim.warmup_steps=7", "optim.warmup_steps: 0 -> 7: learning rates follow another schedule"),
        ("optim.beta2=0.5", "optim.beta2: 0.999 -> 0.5: coming updates follow another rule"),
        ("optim.llm.trainable=false", "optim.llm.trainable: True -> False: coming updates follow another rule"),
        ("train.seed=7", "train.seed: 1234 -> 7: the order of coming samples is not that of the saved run"),
        ("data.train=[b.json]", r"data.train: \[\] -> \['b.json'\]: the order of coming samples"),
        ("data.num_frames=3", "data.num_frames: .* -> 3: coming samples are made in another way"),
        ("train.seq_length=77", "train.seq_length: .* -> 77: coming samples are made in another way"),
        ("data.eval=[b.json]", "data.eval: .*: results on held-out samples are not comparable"),
        ("train.precision=fp64", "train.precision: .* -> fp64: coming steps differ by rounding"),
        ("model.llm.rope_theta=7.0", "model.llm.rope_theta: .* -> 7.0: the model computes something else"),
    ],
)
def test_a_changed_setting_is_told_with_its_old_and_new_value_and_its_effect(tokenizer, change, line):
    (found,) = changes(settings(tokenizer), settings(tokenizer, change))
    assert re.match(line, found), found


@pytest.mark.parametrize(
    "change", ["parallel.tp=2", "memory.recompute=full", "train.output=x", "checkpoint.keep=7", "data.workers=7"]
)
def test_where_and_how_a_run_computes_is_not_told(tokenizer, change):
    assert changes(settings(tokenizer), settings(tokenizer, change)) == []


def test_every_pattern_means_a_setting_and_no_setting_is_both_watched_and_unwatched(tokenizer):
    kept = settings(tokenizer)
    names = {key.name for key in config_keys()} | kept.keys()
    for pattern in (*UNWATCHED, *(pattern for rule in RULES for pattern in rule.keys)):
        assert any(fnmatchcase(name, pattern) for name in names), pattern
    assert not {name for name in kept if any(fnmatchcase(name, pattern) for pattern in UNWATCHED)}


def test_another_tokenizer_or_another_meaning_of_the_weights_is_refused_with_the_cure(tokenizer, tmp_path):
    train_tokenizer(corpus(), tmp_path / "other", 380)
    before = settings(tokenizer)
    now = settings(tmp_path / "other", "model.llm.num_heads=2", "model.projector.token_order=legacy_column_major")
    with pytest.raises(CheckpointError) as error:
        changes(before, now)
    text = str(error.value)
    assert re.search(r"tokenizer.vocabulary: \d+ pieces, \w+ -> 380 pieces, ", text)
    assert "set data.tokenizer to the tokenizer of the saved run" in text
    assert "model.llm.num_heads: 4 -> 2" in text and "legacy_column_major" in text and "checkpoint.load" in text


def test_the_folder_of_a_tokenizer_may_move_and_its_chat_template_is_watched(tokenizer, tmp_path):
    for name in ("moved", "template"):
        train_tokenizer(corpus(), tmp_path / name, 400)
    assert changes(settings(tokenizer), settings(tmp_path / "moved")) == []
    (tmp_path / "template" / "chat_template.jinja").write_text(CHAT_TEMPLATE + "x")
    (line,) = changes(settings(tokenizer), settings(tmp_path / "template"))
    assert line.startswith("tokenizer.chat_template: ") and "text around the turns" in line


def test_checkpoints_of_older_versions_are_compared_in_what_they_keep(tokenizer):
    now = settings(tokenizer, "data.media_format=verbatim", "data.parse_control_tokens=true")
    assert changes(kept_settings({}), now) == []
    (line,) = changes(kept_settings({"data": {"train.seed": 7, "data.packing": False}}), now)
    assert line.startswith("train.seed: 7 -> 1234")


def test_conversations_in_another_format_are_refused_also_of_checkpoints_that_name_none(tokenizer):
    for saved in (settings(tokenizer, "data.media_format=verbatim"), {}):
        with pytest.raises(CheckpointError, match=r"data.media_format: verbatim -> vila.*set data.media_format.*verbatim"):
            changes(saved, settings(tokenizer))


def test_a_new_run_with_the_ids_of_other_separators_is_refused_and_other_texts_are_told(tokenizer, tmp_path):
    train_tokenizer([text[::-1] for text in corpus()], tmp_path, 400)
    ids = "data.frame_separator_ids=[290,310,320,340]"
    before = settings(tokenizer, ids)
    now = settings(tmp_path, "data.media_format=verbatim")
    with pytest.raises(CheckpointError, match=r"frame_separator_ids=.290, 310.*were the texts .*tokenizer of the weights"):
        other_text(before, settings(tmp_path, ids))
    lines = other_text(before, now)
    assert [line.split(":")[0] for line in lines] == ["tokenizer.vocabulary", "data.media_format"]
    assert other_text(before, before) == other_text({}, now) == []


def resumed(rank, overrides_):
    """What the run says of changed settings, or why it is refused."""
    said = test_damaged_checkpoint.resumed(rank, overrides_)
    return said if isinstance(said, str) else [line for line in said if line.startswith(CHANGED)]


def test_a_run_that_goes_on_tells_what_changed_and_all_ranks_refuse_what_makes_no_sense(videos, tmp_path):
    output = tmp_path / "run"
    pool.run(1, train, overrides(videos, output, "train.steps=1"))
    (said,) = pool.run(1, resumed, overrides(videos, output, "train.steps=2", "optim.beta1=0.5"))
    assert [line.split(":")[1].strip() for line in said] == ["optim.beta1", "train.steps"]
    # What was told once is kept in the next checkpoint.
    assert pool.run(1, resumed, overrides(videos, output, "train.steps=2", "optim.beta1=0.5")) == [[]]
    order = ("train.steps=3", "optim.beta1=0.5", "model.projector.token_order=legacy_column_major")
    for text in pool.run(2, resumed, overrides(videos, output, *order)):
        assert "cannot continue from" in text and "token_order: row_major -> legacy_column_major" in text
    train_tokenizer(corpus(), tmp_path / "other", 380)
    load = (f"checkpoint.load={output}", f"data.tokenizer={tmp_path / 'other'}", "train.steps=1", "checkpoint.save=false")
    ((line,),) = pool.run(1, resumed, overrides(videos, tmp_path / "new", *load))
    assert line.startswith(f"warning: other than for the weights of {output}: tokenizer.vocabulary: ")


def save_as_older_versions_did(rank, folder):
    run = build((1, 1, 1, 1))
    kept = {"train.seed": 1, "train.global_batch_size": 1, "data.train": [], "data.shuffle": True, "data.packing": False}
    save_checkpoint(folder, 1, [run.ddp], run.optimizer, run.scheduler, {"step": 1, "data": kept})
    return kept_settings(load_checkpoint(folder, [run.ddp], run.optimizer, run.scheduler)) == kept


def test_the_settings_of_older_checkpoints_are_found(tmp_path):
    assert pool.run(1, save_as_older_versions_did, str(tmp_path)) == [True]

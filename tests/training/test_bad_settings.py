"""What a user gets for settings that do not fit: one message with a cure; and what a dry run checks and shows."""

from megatron_vila.checkpoint.save_load import latest_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.data.chat import describe
from megatron_vila.training.run_data import open_dataset
from tests.data.material import write_jsonl
from tests.ranks import pool
from tests.training.command_run import command_on_rank, dry_run, refused, run_command
from tests.training.real_run import Layout, overrides


def test_settings_that_do_not_fit_are_refused_with_a_cure(videos, tmp_path):
    good = overrides(videos, tmp_path / "run")
    two = Layout(2)
    refused(Layout(2, ulysses=3), good, "world size 2 is not a multiple of", "start 3 processes")
    three_heads = [*good, "model.llm.head_dim=8", "model.llm.num_heads=3", "model.llm.num_kv_heads=3"]
    refused(Layout(2, tp=2), three_heads, "tp=2", "3 query heads", "use")
    refused(Layout(2, ulysses=2), three_heads, "ulysses=2", "3 query heads", "use")
    refused(Layout(2, pp=2), [*good, "model.llm.num_layers=3"], "pp=2", "3", "use")
    refused(two, [*good, "train.global_batch_size=3"], "train.global_batch_size=3", "use 2 or 4")
    refused(two, [*good, "train.stepz=3"], "train.stepz", "train.steps")
    refused(two, [*good, "train.steps=many"], "train.steps is 'many'", "whole number")
    refused(two, [*good, "data.train=[nowhere.json]"], "data.train", "nowhere.json", "does not exist")
    refused(two, [*good, "data.tokenizer=nowhere"], "data.tokenizer='nowhere' is not a folder")
    refused(two, [*good, "checkpoint.load=nowhere"], "checkpoint.load='nowhere'")
    refused(two, [*good, "optim.warmup_steps=100"], "optim.warmup_steps=100", "use at most 99")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_checkpoint_cannot_be_loaded(videos, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = overrides(videos, tmp_path / "run", f"checkpoint.load={tmp_path / 'empty'}")
    refused(Layout(2), arguments, str(tmp_path / "empty"), "no finished checkpoint")


def test_a_dry_run_says_what_it_checked_and_starts_nothing(videos, tmp_path):
    held_out = f"data.eval=[{videos / 'eval_3.json'}]"
    arguments = overrides(videos, tmp_path / "run", "parallel.ulysses=2", "train.precision=auto", held_out)
    status, out, err = dry_run(arguments, "--world-size", "4", "--gpu", "h200")
    assert (status, err) == (0, "")
    assert "24 samples in" in out and "train_3.json" in out
    assert "data.eval: 8 samples in" in out
    assert "on an H200 with 139.8 GiB (planned for; --gpu names another)" in out
    assert "Start: random weights" in out
    assert "dry run for 4 ranks: everything fits together" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_any_sample_of_either_set_as_the_model_sees_it(videos, tmp_path):
    held_out = f"data.eval=[{videos / 'eval_3.json'}]"
    arguments = overrides(videos, tmp_path / "run", held_out)
    status, out, err = dry_run(arguments, "--show", "9", "--show", "eval:7")
    assert (status, err) == (0, "")
    config = load_config("tiny", arguments)
    for name, index in (("train", 9), ("eval", 7)):
        dataset = open_dataset(config, name)
        assert f"number {index}:\n{describe(dataset.build(index).document, dataset.encoder.tokenizer)}\n" in out, name
    assert out.count("number ") == 2
    for show, words in (
        ("24", "--show 24 is not in data.train, which has samples 0 to 23"),
        ("eval:8", "--show 8 is not in data.eval, which has samples 0 to 7"),
        ("test:1", "--show test:1 must be the number of a sample"),
        ("-1", "--show -1 must be the number of a sample"),
        ("9" * 30, "must be the number of a sample"),
    ):
        status, _, err = dry_run(arguments, f"--show={show}")
        assert status == 2 and words in err, err


def test_a_dry_run_looks_at_the_checkpoint_that_the_run_would_take(videos, tmp_path):
    one = overrides(videos, tmp_path / "one", "train.steps=1")
    assert run_command(Layout(), one)[0] == 0
    _, out, err = dry_run([*one, "train.steps=5"])
    assert "step-00000001 after step 1; 4 of train.steps=5 are left" in out, err
    assert "changed since: train.steps: 1 -> 5: the run ends there" in out
    status, _, err = dry_run([*one, "train.steps=5", "model.llm.num_kv_heads=4"])
    assert status == 2 and "cannot load checkpoint" in err
    load = f"checkpoint.load={tmp_path / 'one'}"
    _, out, err = dry_run(overrides(videos, tmp_path / "two", load))
    assert f"Start: weights of {latest_checkpoint(tmp_path / 'one')}" in out, err
    status, _, err = dry_run(overrides(videos, tmp_path / "two", load, "model.llm.ffn_hidden_size=64"))
    assert status == 2
    assert "it is of another model than this configuration" in err and "linear_fc1.weight is [4, 64, 32]" in err
    for settings in (overrides(videos, tmp_path / "two", load), [*one, "train.steps=5"]):
        settings = [*settings, "model.llm.vocab_size=508"]
        words = "model.llm.vocab_size=508, and the checkpoint has a vocabulary of 512: rows from 508 on would be lost"
        status, _, err = dry_run(settings)
        assert status == 2 and words in err, err
        assert refused(Layout(), settings, words) == err
    # Frozen parts and the layout are no part of the model.
    other = ["optim.vision.trainable=false", "parallel.tp=2"]
    assert dry_run(overrides(videos, tmp_path / "two", load, *other), "--world-size=2")[0] == 0
    (latest_checkpoint(tmp_path / "one") / ".metadata").unlink()
    status, _, err = dry_run(overrides(videos, tmp_path / "two", load))
    assert status == 2 and "cannot load checkpoint" in err and ".metadata" in err


def test_a_dry_run_with_bad_input_ends_with_status_2(videos, tmp_path):
    for bad, words in (
        ("model.llm.num_kv_heads=3", "model.llm.num_kv_heads=3 does not divide"),
        (f"data.train=[{write_jsonl(tmp_path / 'bad.jsonl', [{'id': 'x'}])}]", "bad.jsonl, line 1"),
    ):
        arguments = overrides(videos, tmp_path / "run", bad)
        status, _, err = pool.run(1, command_on_rank, 1, ["tiny", *arguments, "--dry-run"])[0]
        assert status == 2 and words in err, err

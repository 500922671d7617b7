"""The files of samples are opened once in a run, by every rank, and all ranks agree on what is in them."""

import pytest

from megatron_vila.config.load import load_config
from megatron_vila.data.sources import json_files
from megatron_vila.errors import ConfigError, PeerError
from megatron_vila.training.run_data import open_run_data
from tests.data.material import conversation, write_jsonl
from tests.ranks import pool
from tests.training.real_run import overrides, train


def _opened(rank, settings, own):
    """Length of the data sets, or the error, of a rank that reads its own copy ``own[rank]`` of the training file."""
    config = load_config("tiny", [*settings, f"data.train=[{own[rank]}]"])
    try:
        data = open_run_data(config, is_writer=rank == 0)
    except (ConfigError, PeerError) as error:
        return str(error)
    return len(data.train), len(data.held_out)


def test_copies_of_a_file_may_differ_in_name_and_time_and_not_in_their_records(videos, tmp_path):
    held_out = f"data.eval=[{videos / 'eval_3.json'}]"
    settings = overrides(videos, tmp_path, held_out)
    text = {"id": "a", "conversations": conversation()}
    paths = []
    for name, records in (("one", [text]), ("same", [text]), ("other", [{**text, "id": "b"}])):
        (tmp_path / name).mkdir()
        paths.append(write_jsonl(tmp_path / name / "train.jsonl", records))
    one, same, other = paths
    assert set(pool.run(2, _opened, settings, [one, same])) == {(1, 8)}
    for told in pool.run(3, _opened, settings, [one, same, other]):
        assert "not the same files on all nodes: rank 2 found other records in them than rank 0" in told
    missing = str(tmp_path / "missing.jsonl")
    told = pool.run(2, _opened, settings, [one, missing])
    assert told == [
        "another rank cannot open its files of samples",
        f"{missing}: the file with samples cannot be read: No such file or directory",
    ]


def _opens(rank, settings):
    """How often a file of samples is opened in a run that evaluates three times."""
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        index_of = json_files.index_of
        patch.setattr(json_files, "index_of", lambda path, rules: opened.append(path) or index_of(path, rules))
        train(rank, settings)
    return opened


def test_a_run_opens_each_file_once_on_each_rank(videos, tmp_path):
    settings = overrides(
        videos, tmp_path / "run", f"data.eval=[{videos / 'eval_3.json'}]", "train.steps=3", "train.eval_every=1"
    )
    files = load_config("tiny", settings).data
    assert pool.run(2, _opens, settings) == [[*files.train, *files.eval]] * 2

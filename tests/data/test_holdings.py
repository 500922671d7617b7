"""What prepared shards hold is compared with what the settings of a run want."""

import json
import re

import pytest

from megatron_vila.config.schema import Config
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources.holdings import holdings_of, holdings_warnings
from megatron_vila.data.sources.open import open_records
from tests.data.shard_files import sample, write_shards

HELD = {"format": 1, "media_format": "vila", "short_side": 384, "fps": 2.0, "picture_side": 2048, "codec": "h264"}


def prepared(folder, **changes):
    write_shards(folder, [[("k", {"json": sample(0)})]])
    (folder / "megatron_vila.json").write_text(json.dumps(HELD | changes))
    return str(folder)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = Config()
    config.model.vision.image_size, config.data.fps = 384, 2.0
    return config


def test_settings_that_want_no_more_than_the_shards_hold_are_not_told(config, tmp_path):
    for changes in ({}, {"short_side": 0, "fps": 0, "picture_side": 0}, {"short_side": 512, "fps": None}):
        assert (
            holdings_warnings(config, open_records(config.data, [prepared(tmp_path / "a", **changes)]).holdings) == []
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"short_side": 256}, "a short side of at most 256 pixels, and the tower reads 384 .*--short-side 384"),
        ({"picture_side": 336}, "a long side of at most 336 pixels, and the tower reads 384 .*--picture-side 384"),
        ({"fps": 1}, "at most 1 frames a second, and data.fps=2 asks for more.* --fps 2, or set data.fps=1"),
        ({"media_format": "verbatim"}, "rule verbatim, and data.media_format=vila .*Set data.media_format=verbatim"),
    ],
)
def test_settings_that_want_more_are_told_by_folder_setting_and_cure(config, tmp_path, changes, words):
    folder = prepared(tmp_path / "a", **changes)
    (warning,) = holdings_warnings(config, open_records(config.data, [folder, prepared(tmp_path / "b")]).holdings)
    assert warning.startswith(f"{folder}: ") and re.search(words, warning)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON.*--finish"),
        (b"[]", r"have format \[\], and format 1 is read here"),
        (b'{"format": 2}', "the shards have format 2, and format 1 is read here"),
        (b'{"format": 1, "fps": "two"}', "field 'fps': must be a number, 0 or more, found 'two'; .*--finish"),
        (b'{"format": 1, "short_side": -1}', "field 'short_side': must be a number"),
        (b'{"format": 1, "media_format": "other"}', "field 'media_format': must be vila or verbatim, found 'other'"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(content, words):
    with pytest.raises(RecordError, match=words):
        holdings_of(content, "x/megatron_vila.json")

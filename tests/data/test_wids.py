"""VILA's WebDataset folders are read in place: the samples of wids, in its order, and what is lost of damaged shards."""

import json
import os
from dataclasses import replace

import pytest

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources import wids
from megatron_vila.data.sources.open import open_records
from tests.data.material import conversation
from tests.data.shard_files import sample, write_tar

DATA = replace(DataConfig(), media_format="verbatim")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_wids(folder, shards, **changes):
    """A folder as VILA's tool leaves it; ``changes`` replace fields of the list."""
    listed = []
    for name, samples in shards.items():
        path = write_tar(folder / name, samples)
        listed.append({"url": name, "nsamples": len(samples), "filesize": path.stat().st_size})
    meta = {"name": "coyo-dev", "__kind__": "VILA-WebDataset", "wids_version": 1, "shardlist": listed, **changes}
    (folder / "wids-meta.json").write_text(json.dumps(meta))
    return str(folder)


def ids(records):
    return [records.record(n).sample_id for n in range(len(records)) if n not in records.bad]


def test_samples_of_vila_are_read_in_the_order_of_the_list(tmp_path):
    eagle = {"json": {"id": "e", "conversations": conversation("<image><image>Which?")}, "1.img": b"a", "2.img": b"b"}
    shards = {
        "b/00.tar": [("x", {"jpg": b"p", "txt": b"A bear."}), ("y", {"json": sample(1)})],
        "a.tar": [("e", eagle), ("v", {"mp4": b"v", "json": {"caption": "A film.", "duration": 3.5}})],
    }
    records = open_records(DATA, [write_wids(tmp_path, shards)])
    assert ids(records) == ["x", "s1", "e", "v"]
    assert [medium.path.name for medium in records.record(2).media] == ["e.1.img", "e.2.img"]
    film = records.record(3)
    assert "A film." in film.turns[-1].text and film.media[0].is_video


def test_the_shards_are_gone_through_once(tmp_path, monkeypatch):
    folder = write_wids(tmp_path, {"0.tar": [("a", {"json": sample(1)})]})
    assert ids(open_records(DATA, [folder])) == ["s1"]
    monkeypatch.setattr(wids, "members", None)
    assert ids(open_records(DATA, [folder])) == ["s1"]


def test_what_a_damaged_shard_has_lost_is_counted_and_the_rest_is_read(tmp_path):
    shards = {"0.tar": [(str(n), {"json": sample(n)}) for n in range(5)], "1.tar": [("z", {"json": sample(9)})]}
    folder = write_wids(tmp_path, shards)
    content = bytearray((tmp_path / "0.tar").read_bytes())
    content[2048:2058] = b"\xff" * 10
    (tmp_path / "0.tar").write_bytes(content)
    records = open_records(DATA, [folder])
    assert ids(records) == ["s0", "s9"], "of the sample before the damage, parts may be lost"
    assert sorted(records.bad) == [1, 2, 3, 4]
    assert "0.tar, after its first 1 samples: at byte 2,048 stands no header" in records.bad[4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shardlist": []}, "names no shards"),
        ({"shardlist": [{"nsamples": 1}]}, "shard 1: 'url' must name a tar file, found None"),
        ({"shardlist": [{"url": "s3://x/0.tar"}]}, "'s3://x/0.tar' is not on this machine"),
        (
            {"shardlist": [{"url": "gone.tar", "nsamples": 1}]},
            "gone.tar: a shard that wids-meta.json lists cannot be read",
        ),
        ({"shardlist": [{"url": "."}]}, "/.: the shard cannot be read: Is a directory; mend that"),
        ({"shardlist": [{"url": "0.tar", "nsamples": "1"}]}, "shard 1: 'nsamples' must be a whole number, found '1'"),
        (
            {"shardlist": [{"url": "0.tar", "nsamples": 1, "filesize": 7}]},
            "0.tar: has 10,240 bytes, and .* says 7: copy it anew",
        ),
    ],
)
def test_a_list_that_does_not_fit_is_refused_by_name_and_cure(tmp_path, changes, words):
    folder = write_wids(tmp_path, {"0.tar": [("a", {"json": sample(1)})]}, **changes)
    with pytest.raises(RecordError, match=words):
        open_records(DATA, [folder])


def test_a_list_that_is_none_is_refused(tmp_path):
    for content in (b"\xff", b"{", b"[" * 100_000, b"[]"):
        (tmp_path / "wids-meta.json").write_bytes(content)
        with pytest.raises(RecordError, match=r"wids-meta\.json: (not JSON|names no shards)"):
            open_records(DATA, [str(tmp_path)])


def test_a_pickled_record_is_refused_and_not_read(tmp_path):
    folder = write_wids(tmp_path, {"0.tar": [("a", {"pkl": b"cos\nsystem\n(S'touch owned'\ntR.", "jpg": b"p"})]})
    with pytest.raises(RecordError, match="pkl may hold a pickled object, which is never read: write it as JSON"):
        open_records(DATA, [folder]).record(0)
    assert not os.path.exists("owned")

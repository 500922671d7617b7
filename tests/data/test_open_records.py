"""Which source reads a path of ``data.train``."""

from dataclasses import replace

import pytest

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.fields import RecordError
from megatron_vila.data.sources.open import open_records
from tests.data.material import conversation, write_jsonl
from tests.data.shard_files import sample, write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_files_of_one_kind_are_read_by_the_settings_of_the_run(tmp_path):
    for name in ("all", "more"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": f"{name}.png", "conversations": conversation()}])
    records = open_records(
        replace(DataConfig(), media_dir="/media"), [f"{tmp_path}/more.jsonl", f"{tmp_path}/all.jsonl"]
    )
    assert [records.record(n).media[0].path for n in range(2)] == ["/media/more.png", "/media/all.png"]


def test_paths_of_several_kinds_are_read_one_after_the_other(tmp_path):
    write_shards(tmp_path / "a", [[("0", {"json": sample(0)}), ("1", {"json": sample(1)})]])
    write_shards(tmp_path / "b", [[("9", {"json": sample(9)}), ("bad", {"json": sample(8)})]])
    tar = tmp_path / "b/000000.tar"
    tar.write_bytes(tar.read_bytes()[:1600])
    lines = write_jsonl(tmp_path / "c.jsonl", [sample(5), {"id": "bad"}])
    records = open_records(DataConfig(), [str(tmp_path / "a"), lines, str(tmp_path / "b")])
    assert (len(records), sorted(records.bad)) == (6, [3, 5]) and not records.is_self_contained
    assert open_records(DataConfig(), [str(tmp_path / "a")] * 2).is_self_contained
    assert [records.record(n).sample_id for n in (0, 1, 2, 4)] == ["s0", "s1", "s5", "s9"]
    assert records.name(3) == f"{lines}, line 2" and records.name(5).endswith("b/000000.tar, sample bad")
    assert records.digest != open_records(DataConfig(), [lines, str(tmp_path / "a"), str(tmp_path / "b")]).digest
    with pytest.raises(IndexError):
        records.record(6)


def test_a_path_of_no_known_format_and_an_empty_list_say_what_is_expected(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(RecordError, match=r"the name must end in \.json"):
        open_records(DataConfig(), [str(tmp_path / "a.csv")])
    with pytest.raises(RecordError, match=r"set data\.train to at least one"):
        open_records(DataConfig(), [])

"""The index of a file of records: made once, shared, made anew when it should be, and equal whoever makes it."""

import json
import os
import resource
import threading
import time

import numpy as np
import pytest

from megatron_vila.data import fields
from megatron_vila.data.fields import RecordError
from megatron_vila.data.records import RecordRules
from megatron_vila.data.sources import index as index_module
from megatron_vila.data.sources.index import check_records, index_of
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.sources.source import ChangedFileError
from tests.data.material import conversation, write_jsonl

RULES = RecordRules("/media")
BAD = {2: {"id": "no turns"}, 5: {"id": "other", "video": 3}}


def samples(count, more=()):
    return [
        BAD.get(n, {"id": n, "video": f"{n}.mp4", "conversations": conversation(f"{n}? é")}) for n in range(count)
    ] + [*more]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "SMALLEST_FILE", 0)
    return tmp_path / "cache" / "megatron_vila" / "records"


@pytest.fixture
def checked(monkeypatch):
    """The files whose records were checked in this process."""
    files = []

    def check(path, rules, found):
        files.append(path)
        time.sleep(0.02)  # others get their turn
        return check_records(path, rules, found)

    monkeypatch.setattr(index_module, "check_records", check)
    return files


def same(one, other):
    return np.array_equal(one.places, other.places) and (one.bad, one.digest) == (other.bad, other.digest)


def test_an_index_is_made_by_one_of_those_who_open_a_file_at_once_and_mapped_by_all(tmp_path, cache, checked):
    path = write_jsonl(tmp_path / "a.jsonl", samples(50))
    barrier, found = threading.Barrier(4), []

    def open_file():
        barrier.wait()
        found.append(index_of(path, RULES))

    threads = [threading.Thread(target=open_file) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert checked == [path] and len(found) == 4
    kept = index_of(path, RULES)
    assert all(same(kept, one) for one in found) and sorted(kept.bad) == [2, 5]
    assert isinstance(kept.places, np.memmap) and not kept.places.flags.writeable
    assert [file.suffix for file in cache.iterdir()] == [".npy"]


def test_a_kept_index_gives_the_same_records_and_the_same_reasons(tmp_path, cache, checked):
    records = samples(8)
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    for path in (write_jsonl(tmp_path / "a.jsonl", records), str(tmp_path / "a.json")):
        first, second = (JsonFiles([path], "/media", skip_bad=True) for _ in range(2))
        assert first.bad == second.bad and first.digest == second.digest and sorted(first.bad) == [2, 5]
        good = [index for index in range(8) if index not in first.bad]
        assert [first.record(index) for index in good] == [second.record(index) for index in good]
        for bad, reason in second.bad.items():
            with pytest.raises(RecordError) as error:
                second.record(bad)
            assert str(error.value) == reason
    assert len(checked) == 2


def test_an_index_is_made_anew_for_another_file_time_size_setting_or_rule(tmp_path, cache, checked, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", samples(8))
    before = index_of(path, RULES)
    os.utime(path, ns=(1, 1))
    assert same(index_of(path, RULES), before) and len(checked) == 2
    write_jsonl(tmp_path / "a.jsonl", samples(9))
    os.utime(path, ns=(1, 1))
    assert len(index_of(path, RULES).places) == 9 and len(checked) == 3
    assert len(list(cache.iterdir())) == 1, "the index of a file takes the place of an earlier one"
    assert index_of(path, RecordRules("/other")) and len(checked) == 4
    assert sorted(index_of(path, RecordRules("/media", ignore_fields=frozenset({"video"}))).bad) == [2, 5]
    assert sorted(index_of(path, RecordRules("/media", "verbatim")).bad) == [2, 5] and len(checked) == 6
    (tmp_path / "rules.py").write_text("# other rules")
    monkeypatch.setattr(fields, "__file__", str(tmp_path / "rules.py"))
    assert index_of(path, RULES) and len(checked) == 7


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x93NUMPY\x01\x00", "cut", "no end"])
def test_rubbish_in_the_place_of_an_index_is_not_read(tmp_path, cache, checked, content):
    path = write_jsonl(tmp_path / "a.jsonl", samples(8))
    before = index_of(path, RULES)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:200], "no end": whole[:-3]}.get(content, content))
    assert same(index_of(path, RULES), before) and len(checked) == 2
    assert file.read_bytes() == whole


def test_objects_in_an_index_are_not_unpickled(tmp_path, cache, checked):
    path = write_jsonl(tmp_path / "a.jsonl", samples(8))
    index_of(path, RULES)
    (file,) = cache.iterdir()
    np.save(file, np.array([{"a": 1}], dtype=object))
    assert sorted(index_of(path, RULES).bad) == [2, 5] and len(checked) == 2


def test_folders_that_cannot_be_written_only_cost_the_time(tmp_path, cache, checked, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", samples(8))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(index_of(path, RULES), index_of(path, RULES)) and len(checked) == 2


def test_a_full_disk_only_costs_the_time_and_leaves_nothing_behind(tmp_path, cache, checked):
    """A limit on the size of files ends a write as a full disk does; a small file stays in its buffer until it is closed."""
    path = write_jsonl(tmp_path / "a.jsonl", samples(8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        found = index_of(path, RULES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(found.bad) == [2, 5] and list(cache.iterdir()) == []


def test_processes_that_check_parts_find_what_one_finds(tmp_path, cache, checked, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", samples(700, [{"id": "last"}]))
    alone = index_of(path, RULES)
    monkeypatch.setattr(index_module, "PART", os.path.getsize(path) // 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    together = index_of(path, RecordRules("/media/"))
    assert checked == [path], "the parts were checked elsewhere"
    assert sorted(alone.bad) == [2, 5, 700] and same(alone, together)


def test_a_process_that_fails_leaves_its_part_to_the_one_that_waits(tmp_path, cache, checked, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", samples(20))
    monkeypatch.setattr(index_module, "PART", os.path.getsize(path) // 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert sorted(index_of(path, RULES).bad) == [2, 5] and checked == [path, path]


def test_a_file_that_changes_after_it_was_opened_is_told_where_it_matters(tmp_path):
    path = tmp_path / "a.jsonl"
    files = JsonFiles([write_jsonl(path, samples(8))], skip_bad=True)
    before = path.read_bytes()
    os.utime(path, ns=(1, 1))
    path.write_bytes(before + b'{"id": "more"}\n')
    assert files.record(7).sample_id == "7", "records that are the same are read, whatever else happens to the file"
    path.write_bytes(before.replace(b'"id": 6', b'"id": 9'))
    assert files.record(7).sample_id == "7"
    with pytest.raises(ChangedFileError, match="a.jsonl, line 7: not what it was when the file was opened"):
        files.record(6)
    path.write_bytes(before[:-20])
    with pytest.raises(ChangedFileError, match="line 8"):
        files.record(7)
    path.unlink()
    with pytest.raises(ChangedFileError, match="is gone"):
        files.record(0)
    path.mkdir()
    with pytest.raises(ChangedFileError, match="a.jsonl cannot be read: Is a directory; mend that and start again"):
        files.record(0)


def test_a_file_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, samples(8))

    def check(*arguments):
        path.write_bytes(path.read_bytes() + b"{}\n")
        return check_records(*arguments)

    monkeypatch.setattr(index_module, "check_records", check)
    with pytest.raises(RecordError, match="a.jsonl: the file changes while it is read"):
        index_of(str(path), RULES)


def test_tens_of_thousands_of_records_in_a_list_stand_where_a_parser_finds_them(tmp_path):
    records = [{"id": n, "conversations": conversation(f'{n} "[' + "]}" * (n % 3))} for n in range(20_000)]
    records[7] = {"id": [[[[[["deep"]]]]]], "conversations": conversation()}
    (tmp_path / "a.json").write_text(json.dumps(records))
    files = JsonFiles([str(tmp_path / "a.json")], skip_bad=True)
    assert len(files) == 20_000 and list(files.bad) == [7]
    for number in (0, 6, 8, 19_999):
        assert files.record(number).sample_id == str(number)
        assert files.record(number).turns[0].text == records[number]["conversations"][0]["value"]

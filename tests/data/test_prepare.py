"""Records of a source become shards: in their order, whole or not at all, the same bytes whatever happens on the way."""

import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vila.data.prepare.command import main
from megatron_vila.data.prepare.finish import UnfinishedError, all_steps
from megatron_vila.data.prepare.options import Options
from megatron_vila.data.prepare.part import TooManyBadError
from megatron_vila.data.prepare.pool import DiedError, Pool
from megatron_vila.data.prepare.report import page, summary
from megatron_vila.data.prepare.run import Task, begin, disk_errors, do_parts
from megatron_vila.data.prepare.state import StateError
from megatron_vila.data.prepare.tally import total
from megatron_vila.errors import SettingError, UserError
from tests.data.stamped import stamped, write

SHARD = 40_000
OPTIONS = Options(short_side=64, shard_bytes=SHARD)


def turns(question="What?", answer="That."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


RECORDS = [
    {"id": "first", "video": "a.mp4", "conversations": turns("Look: <video>\nWhat?")},
    {"id": "words", "conversations": turns("What does <image> mean in a sentence like this?", " A <video>. ")},
    {"id": "two pictures", "image": ["p.png", "q.jpg"], "conversations": turns("One <image>, two <image>?")},
    {"id": "gone", "video": "gone.mp4", "conversations": turns("<video>\nWhat?")},
    {"id": "clip", "video": "a.mp4", "start": 1.0, "end": 2.0, "conversations": turns("<video>")},
    {"id": "again", "video": "a.mp4", "conversations": turns("<video>\nAnd?")},
    {"id": "no turns", "video": "a.mp4"},
    {"id": "pictures", "video": "frames", "conversations": turns("<video>")},
    {"id": "cut", "video": "cut.mp4", "conversations": turns("<video>")},
    {"id": "mixed", "image": "p.png", "video": ["b.mkv", "a.mp4"], "conversations": turns("<video> <image> <video>")},
    *({"id": f"text {i}", "conversations": turns(f"Number {i}?" * 50)} for i in range(40)),
    {"id": "late", "video": "b.mkv", "conversations": turns("<video>")},
]
BAD = ["gone", "", "cut"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write(folder / "a.mp4", frames=72)
    write(folder / "b.mkv", frames=40, rate=10)
    Image.fromarray(stamped(5)).save(folder / "p.png")
    Image.fromarray(stamped(6)).save(folder / "q.jpg")
    (folder / "frames").mkdir()
    for i in range(3):
        Image.fromarray(stamped(i)).save(folder / "frames" / f"{i}.png")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def task(source, out, **changes):
    return Task((str(source / "train.jsonl"),), str(out), replace(OPTIONS, **changes))


def run(task, parts=None, processes=0, on_sample=lambda: None):
    """Do parts of a task without the index, which a program of its own makes; returns the steps."""
    source, plan, output = begin(task)
    task = replace(task, processes=processes)
    do_parts(task, source, plan, output, range(task.options.parts) if parts is None else parts, on_sample)
    return [step for part in range(task.options.parts) for step in output.steps(part)]


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def samples(folder):
    """Key: parts of each sample, in the order in which they stand."""
    found = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                found.setdefault(key, {})[part] = tar.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The source, prepared at once in this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(task(source, out))


def test_good_samples_stand_in_the_shards_in_the_order_of_the_source(whole):
    out, steps = whole
    found = samples(out)
    expected = [i for i, record in enumerate(RECORDS) if record["id"] not in ("gone", "no turns", "cut")]
    assert [int(key) for key in found] == expected
    assert [json.loads(parts["json"])["id"] for parts in found.values()] == [RECORDS[i]["id"] for i in expected]
    assert len(shards(out)) > 1 and max(map(len, shards(out).values())) <= SHARD + 10_240
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert sorted(p.name for p in (out / "prepare").iterdir() if p.is_dir()) == []  # nothing is left of the media


def test_a_sample_names_its_media_by_their_parts_and_its_text_is_that_of_the_source(whole):
    found = samples(whole[0])
    mixed = json.loads(found["000000009"]["json"])
    assert mixed["video"] == ["0.mp4", "2.mp4"] and mixed["image"] == ["1.png"]
    assert mixed["conversations"][0]["value"] == "<video> <image> <video>"
    assert list(found["000000009"]) == ["json", "0.mp4", "1.png", "2.mp4"]
    assert json.loads(found["000000007"]["json"])["video"] == [["0.000000.jpg", "0.000001.jpg", "0.000002.jpg"]]
    words = json.loads(found["000000001"]["json"])
    assert words["conversations"] == turns(r"What does \<image> mean in a sentence like this?", " A <video>. ")
    clip = json.loads(found["000000004"]["json"])
    assert clip["video"] == ["0.mp4"] and "start" not in clip  # it is cut out


def test_a_video_that_is_taken_as_it_is_keeps_the_clip_of_its_record(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    video = write(tmp_path / "noise.mp4", frames=12, rate=4, pictures=noise)
    clips = {"video": ["noise.mp4", "noise.mp4"], "start": [1.0, None], "end": [2.0, None]}
    record = clips | {"conversations": turns("<video><video>")}
    (tmp_path / "train.json").write_text(json.dumps([record]))
    coarse = replace(OPTIONS, crf=51, poor="original")
    (step,) = run(Task((str(tmp_path / "train.json"),), str(tmp_path / "out"), coarse))
    (parts,) = samples(tmp_path / "out").values()
    content = json.loads(parts["json"])
    assert (content["video"], content["start"], content["end"]) == (["0.mp4", "1.mp4"], [1.0, None], [2.0, None])
    assert parts["0.mp4"] == parts["1.mp4"] == Path(video).read_bytes()
    assert step.tally.media == {"original": 2} and "dB in the worst frame" in step.tally.poor[0].reason


def test_bad_samples_are_left_out_with_place_and_reason(whole):
    tally = total(step.tally for step in whole[1])
    assert [note.sample_id for note in tally.bad] == BAD
    gone, no_turns, cut = tally.bad
    assert gone.key == 3 and gone.place.endswith("train.jsonl, line 4")
    assert "gone.mp4: cannot be read: No such file" in gone.reason
    assert "'conversations'" in no_turns.reason and "cut.mp4" in cut.reason
    assert tally.samples == len(RECORDS) - 3
    assert tally.media == {"video": 6, "image": 3, "pictures": 1, "text": 41}
    assert tally.frames_of[-1] == 42 and sum(tally.frames_of.values()) == tally.samples


def test_a_medium_of_several_records_is_prepared_once(source, tmp_path, monkeypatch):
    from megatron_vila.data.prepare import part as work

    asked = []

    def counting(medium, options, folder):
        asked.append((medium.path, medium.start_s))
        return prepare_medium(medium, options, folder)

    prepare_medium = work.prepare_medium
    monkeypatch.setattr(work, "prepare_medium", counting)
    run(task(source, tmp_path / "out"))
    assert len(asked) == len(set(asked))


def test_processes_and_parts_give_the_same_samples_and_processes_the_same_bytes(source, whole, tmp_path):
    run(task(source, tmp_path / "many"), processes=2)
    assert shards(tmp_path / "many") == shards(whole[0])
    run(task(source, tmp_path / "parts", parts=3), parts=[2, 0, 1])
    assert samples(tmp_path / "parts") == samples(whole[0])
    assert {name.split("-")[1] for name in shards(tmp_path / "parts")} == {"00000", "00001", "00002"}


class Stop(Exception):
    """What ends a preparation in a test."""


@pytest.mark.parametrize("after", [0, 1, 9, 30, len(RECORDS) - 1])
def test_what_was_stopped_goes_on_to_the_same_bytes_without_doing_finished_shards_again(source, whole, tmp_path, after):
    seen = []

    def stop():
        seen.append(1)
        if len(seen) > after:
            raise Stop

    with pytest.raises(Stop):
        run(task(source, tmp_path / "out"), on_sample=stop)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    run(task(source, tmp_path / "out"))
    assert shards(tmp_path / "out") == shards(whole[0])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_killed_preparation_goes_on_to_the_same_bytes(source, whole, tmp_path):
    out = tmp_path / "out"
    for records in (1, 5, 20, 45):
        told, tell = os.pipe()
        process = multiprocessing.get_context("fork").Process(target=run_until, args=(task(source, out), records, tell))
        process.start()
        os.close(tell)
        assert os.read(told, 1)
        process.kill()
        process.join()
        os.close(told)
    assert list(out.glob(".*.part")) and 0 < len(shards(out)) < len(shards(whole[0]))
    run(task(source, out))
    assert shards(out) == shards(whole[0])
    assert not list(out.glob(".*.part"))


def run_until(task, records, pipe):
    """Do so many records, say so and wait for the end."""
    seen = itertools.count(1)

    def on_sample():
        if next(seen) == records:
            os.write(pipe, b"x")
            time.sleep(600)

    run(task, on_sample=on_sample)


def test_a_shard_whose_end_was_not_written_down_is_made_again(source, whole, tmp_path):
    run(task(source, tmp_path / "out"))
    (tmp_path / "out" / "prepare" / "part-00000-000001.json").unlink()
    name = sorted(shards(tmp_path / "out"))[1]
    (tmp_path / "out" / name).write_bytes(b"half")
    run(task(source, tmp_path / "out"))
    assert shards(tmp_path / "out") == shards(whole[0])


def test_another_source_other_options_and_another_number_of_parts_are_refused(source, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text((source / "train.jsonl").read_text())
    mine = Task((str(copy),), str(tmp_path / "out"), OPTIONS, media_dir=str(source))
    run(mine)
    for change, name in (
        ({"crf": 30}, "--crf 20 (now 30)"),
        ({"parts": 2}, "the number of parts 1 (now 2)"),
        ({"shard_bytes": 2**21}, f"--shard-mib {SHARD / 2**20:g} (now 2)"),
    ):
        with pytest.raises(StateError, match=name.replace("(", r"\(").replace(")", r"\)")):
            run(replace(mine, options=replace(OPTIONS, **change)))
    copy.write_text(copy.read_text() + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(StateError, match="51 records, and now there are 52; put the source back"):
        run(mine)
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join([*lines[1:51], lines[0]]))
    with pytest.raises(StateError, match="51 others"):
        run(mine)


def test_a_finished_shard_that_was_changed_or_removed_is_told(source, tmp_path):
    run(task(source, tmp_path / "out"))
    first = min((tmp_path / "out").glob("*.tar"))
    first.write_bytes(first.read_bytes() + b"more")
    with pytest.raises(StateError, match="in place of"):
        run(task(source, tmp_path / "out"))
    first.unlink()
    with pytest.raises(StateError, match="is missing since it was finished"):
        run(task(source, tmp_path / "out"))


def test_an_output_that_cannot_be_is_refused_before_the_work(source, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("")
    with pytest.raises(StateError, match="not empty .it holds something"):
        run(task(source, full))
    with pytest.raises(SettingError, match="lie in each other"):
        run(task(source, source.parent))
    with pytest.raises(SettingError, match="is a file"):
        run(task(source, source / "a.mp4" / "out"))
    with pytest.raises(SettingError, match="has room for"):
        run(task(source, tmp_path / "out", shard_bytes=2**40))
    with pytest.raises(SettingError, match="60 parts for 51 records"):
        run(task(source, tmp_path / "out", parts=60))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "s3://bucket/set"], "--out s3://bucket/set must be a folder of this machine"),
        (["--media-dir", "s3://bucket/media"], "--media-dir s3://bucket/media must be a folder"),
        (["--media-dir", "nowhere"], "--media-dir nowhere is not a folder; name the folder that paths of media start at"),
        (["--out", ""], "--out is empty (''); name a folder"),
        (["--out", "", "--finish"], "--out is empty (''); name a folder"),
        (["--max-bad", "nan"], "--max-bad nan is out of range; use 0 to 1"),
        (["--max-bad", "50"], "--max-bad 50 is out of range; use 0 to 1"),
        (["--shard-mib", "0"], "--shard-mib 0 is out of range"),
        (["--ray", "0"], "--ray 0 must be a number of parts"),
        (["--processes", "-1"], "--processes -1 must be 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name_before_the_work(
    tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    assert main(["train.json", "--out", "out", *arguments]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_empty_source_is_told_as_such(capsys):
    assert main(["train.json", "", "--out", "out"]) == 2
    assert "a source is empty (''); name a folder or a file" in capsys.readouterr().err


def test_two_processes_do_not_work_on_one_part(source, tmp_path):
    _, _, output = begin(task(source, tmp_path / "out"))
    with output.alone("part 0"), pytest.raises(StateError, match="another process works on part 0"):
        run(task(source, tmp_path / "out"))


def test_parts_that_are_missing_are_named(source, tmp_path):
    mine = task(source, tmp_path / "out", parts=3)
    run(mine, parts=[1])
    _, plan, output = begin(mine)
    with pytest.raises(UnfinishedError, match="2 of 3 parts are not finished: 0, 2; run them"):
        all_steps(output, plan)


def test_too_many_bad_samples_end_the_work_with_the_first_reason(tmp_path):
    records = [{"video": f"{i}.mp4", "conversations": turns("<video>")} for i in range(120)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    mine = Task((str(tmp_path / "train.json"),), str(tmp_path / "out"), OPTIONS, media_dir=str(tmp_path))
    with pytest.raises(TooManyBadError, match=r"100 of the first 100 .* than --max-bad 0.5; the first: .*0\.mp4"):
        run(mine)
    assert len(total(step.tally for step in run(replace(mine, max_bad=1.0))).bad) == 120


def test_a_source_without_one_good_record_is_told(tmp_path):
    (tmp_path / "train.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="nothing can be prepared: 2 of 2 records cannot be used"):
        run(Task((str(tmp_path / "train.json"),), str(tmp_path / "out"), OPTIONS))


def test_a_file_that_ends_its_reader_is_the_fault_of_one_sample():
    with Pool(1) as pool:
        crash, fine = pool.submit(os.kill, 0, 0), pool.submit(abs, -3)
        assert crash.exception() is None and fine.result() == 3
        died = pool.submit(os._exit, 9)
        after = pool.submit(abs, -4)
        assert isinstance(died.exception(), DiedError)
        assert after.result() == 4


def test_a_full_disk_is_told_and_what_is_finished_stays(source, whole, tmp_path):
    """A limit on the size of files ends a write as a full disk does."""
    mine = task(source, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, hard))
    try:
        with pytest.raises(UserError, match="free space, and start the same command again"), disk_errors(mine.out):
            run(mine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").glob("*.tar")) and not list((tmp_path / "out").glob(".*.part"))
    run(mine)
    assert shards(tmp_path / "out") == shards(whole[0])


def test_the_script_for_slurm_does_the_part_of_its_task(tmp_path):
    script = Path(__file__).parents[2] / "examples/slurm_prepare_data.sh"
    given = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "9", "OUTPUT": "o"}
    command = ["bash", str(script), "--fps", "1"]
    done = subprocess.run(command, env=os.environ | given | {"PYTHON": "echo"}, capture_output=True, text=True)
    assert done.stdout.split()[-6:] == ["--out", "o", "--part", "3/9", "--fps", "1"]
    for status, expected in ((1, 0), (2, 2)):  # some samples are bad; nothing could be done
        (tmp_path / "python").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "python").chmod(0o755)
        done = subprocess.run(command, env=os.environ | given | {"PYTHON": str(tmp_path / "python")})
        assert done.returncode == expected


def test_the_report_names_what_was_counted_and_escapes_what_it_shows(whole, source):
    tally = total(step.tally for step in whole[1])
    _, plan, _ = begin(task(source, whole[0]))
    html = page(plan, replace_bad(tally), 3, 10**6)
    assert "videos, encoded anew" in html and "<script>" not in html and "&lt;script&gt;" in html
    assert f"{tally.samples} samples prepared, 3 bad" in summary(tally)


def replace_bad(tally):
    from megatron_vila.data.prepare.tally import Note

    tally.bad[0] = Note(3, "place", "<script>", "reason")
    return tally

"""A prepared folder as others read it: Energon's own loader, this project's, and a run that wants more than it holds."""

import json

import pytest

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import DataConfig
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.prepare.command import main
from megatron_vila.data.prepare.options import Options
from megatron_vila.data.prepare.run import Task, begin, do_parts
from megatron_vila.data.sources.holdings import FILE, Holdings, holdings_of, holdings_warnings
from megatron_vila.data.sources.open import open_records
from megatron_vila.data.tokenizer import load_tokenizer
from megatron_vila.data.video import probe_video
from tests.data.material import sentencepiece_tokenizer
from tests.data.stamped import numbers, write
from tests.data.test_prepare import turns

energon = pytest.importorskip("megatron.energon", reason="the extra prepare is not installed")

RECORDS = [
    {"id": "v", "video": "a.mp4", "conversations": turns("Look: <video>\nWhat?")},
    {"id": "t", "conversations": turns()},
    {"id": "document", "text": "Before <video> after \\<image>.", "video": "b.mp4"},
    {"id": "gone", "video": "gone.mp4", "conversations": turns("<video>")},
    {"id": "w", "video": ["a.mp4", "b.mp4"], "conversations": turns("<video> and <video>")},
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder that the command makes, and the status that it ends with."""
    folder = tmp_path_factory.mktemp("source")
    write(folder / "a.mp4", frames=72)
    write(folder / "b.mp4", frames=24, rate=12)
    (folder / "train.json").write_text(json.dumps(RECORDS))
    out, tokenizer = folder.parent / f"{folder.name}-prepared", str(folder.parent / "tokenizer")
    sentencepiece_tokenizer().save_pretrained(tokenizer)
    arguments = [str(folder / "train.json"), "--config", "tiny", "--short-side", "64", "--processes", "0"]
    return out, main([*arguments, "--out", str(out), "--tokenizer", tokenizer]), arguments, tokenizer


def test_the_command_prepares_what_it_can_and_its_status_tells_of_bad_samples(prepared, capsys):
    out, status, arguments, _ = prepared
    assert status == 1
    assert {path.name for path in out.iterdir()} >= {".nv-meta", "megatron_vila.json", "report.html", "report.json"}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*arguments, "--out", str(out)]) == 1  # again: nothing is left to do
    assert "4 samples prepared, 1 bad" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    report = json.loads((out / "report.json").read_text())
    assert report["samples"] == 4 and report["bad"][0]["sample_id"] == "gone"
    assert report["bad"][0]["place"].endswith("train.json, record 4")


def test_energons_own_loader_reads_the_samples_in_their_order(prepared):
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless
    from megatron.energon.flavors.crude import CrudeSample

    class Raw(DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(stateless(lambda sample: CrudeSample(sample)))]

        def batch(self, samples):
            return samples

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(
        prepared[0], split_part="train", worker_config=workers, batch_size=1, task_encoder=Raw()
    )
    found = [sample for (sample,) in get_loader(dataset)]
    assert [sample["__key__"].rpartition("/")[2] for sample in found] == ["000000000", "000000001", "000000002", "000000004"]
    assert [json.loads(sample["json"])["id"] for sample in found] == ["v", "t", "document", "w"]
    assert set(found[3]) >= {"0.mp4", "1.mp4"} and probe_video(bytes(found[3]["1.mp4"])).num_frames == 4


def test_the_trainers_source_reads_them_with_the_text_and_the_times_of_the_source(prepared):
    records = open_records(DataConfig(media_format="verbatim"), [str(prepared[0])])
    original = open_records(DataConfig(media_format="verbatim", bad_records="skip"), [prepared[2][0]])
    for mine, its in ((0, 0), (1, 1), (2, 2), (3, 4)):
        assert records.record(mine).turns == original.record(its).turns
        assert records.record(mine).sample_id == original.record(its).sample_id
    (first, _) = records.record(3).media
    assert numbers(first.path, range(6)) == [0, 12, 24, 36, 48, 60]
    assert probe_video(first.path).seconds.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_a_prepared_set_can_be_prepared_again(prepared, tmp_path):
    task = Task((str(prepared[0]),), str(tmp_path / "out"), Options(short_side=32, fps=1.0))
    source, plan, output = begin(task)
    do_parts(task, source, plan, output, (0,), lambda: None)
    (step,) = output.steps(0)
    assert step.tally.samples == 4 and not step.tally.bad and step.tally.media == {"video": 4, "text": 1}
    assert step.tally.frames == 3 + 2 + 3 + 2


def test_rays_tasks_do_the_parts(prepared, tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    assert main([*prepared[2], "--out", str(tmp_path / "out"), "--ray", "2"]) == 1
    assert len(open_records(DataConfig(), [str(tmp_path / "out")])) == 4


def test_a_run_that_wants_more_than_the_shards_hold_is_told(prepared):
    holdings = holdings_of((prepared[0] / FILE).read_bytes(), FILE)
    assert holdings == Holdings("verbatim", short_side=64, fps=2.0, picture_side=2048)
    config = load_config("tiny")
    config.model.vision.image_size, config.data.fps = 384, 4.0
    told = "".join(holdings_warnings(config, {"set": holdings}))
    assert "--short-side 384" in told and "--fps 4" in told
    described = json.loads((prepared[0] / "megatron_vila.json").read_text())
    assert described["media"] == {"video": 4, "text": 1} and described["key_distance"] == 1


def test_the_last_part_makes_the_index_and_finish_does_it_too(prepared, tmp_path, capsys):
    arguments = [*prepared[2], "--out", str(tmp_path / "out")]
    assert main([*arguments, "--part", "1/2"]) == 1
    assert "part 1 of 2: 2 samples prepared, 1 bad" in capsys.readouterr().out
    assert main([*arguments, "--finish"]) == 2
    assert "1 of 2 parts are not finished: 0; run them (--part NUMBER/2), then --finish" in capsys.readouterr().err
    assert main([*arguments, "--part", "0/2"]) == 1
    assert (tmp_path / "out" / ".nv-meta" / "index.sqlite").is_file()
    index = tmp_path / "out" / ".nv-meta" / "index.sqlite"
    index.write_bytes(b"damaged")
    (tmp_path / "out" / "megatron_vila.json").write_text("damaged")
    assert main([*arguments, "--finish"]) == 1
    assert index.read_bytes().startswith(b"SQLite") and len(open_records(DataConfig(), [str(tmp_path / "out")])) == 4
    assert main([*arguments, "--part", "2/2"]) == 2
    assert "--part 2/2 must be I/N" in capsys.readouterr().err


def test_nothing_usable_ends_with_2_and_a_report(tmp_path, capsys):
    (tmp_path / "train.json").write_text(json.dumps([{"video": "gone.mp4", "conversations": turns("<video>")}]))
    assert main([str(tmp_path / "train.json"), "--out", str(tmp_path / "out"), "--processes", "0"]) == 2
    told = capsys.readouterr().err
    assert "none of 1 samples can be used" in told and f"remove {tmp_path / 'out'} and start anew" in told
    assert "gone.mp4" in (tmp_path / "out" / "report.html").read_text()


def test_the_counts_of_tokens_are_those_of_training(prepared):
    report, config = json.loads((prepared[0] / "report.json").read_text()), load_config("tiny")
    records = open_records(DataConfig(media_format="verbatim"), [str(prepared[0])])
    dataset = VilaDataset(records, load_tokenizer(prepared[3]), config.data, config.model, 2**20)
    assert report["tokens"] == sum(len(dataset.build(index).document) for index in range(4))
    assert sum(report["tokens_of"].values()) == 4
    assert "Tokens of a sample" in (prepared[0] / "report.html").read_text()

"""Rows from shards: those of the same records in a file, bad samples left out everywhere, a lost shard ends all ranks."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from megatron_vila.config.schema import DataConfig
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.reports import LoaderError
from megatron_vila.data.sources.shards import Shards
from megatron_vila.plan.grid import GridShape
from tests.data.loader_run import MODEL, SEQ_LENGTH, TOKENIZER, Data
from tests.data.material import conversation
from tests.data.shard_files import write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, "png")
    return stream.getvalue()


def record(number):
    return {"id": f"p{number}", "image": f"{number}.png", "conversations": conversation("What?", "A cat.")}


class ShardData(Data):
    """The same samples in shards of three, some of them ``spoiled``: parts by the number of the sample."""

    def __init__(self, tmp_path, count, spoiled=()):
        super().__init__(tmp_path, tmp_path, [record(n) for n in range(count)])
        samples = [
            (f"{n:03d}", {"json": record(n), "png": picture(n)} | dict(spoiled).get(n, {})) for n in range(count)
        ]
        self.shards = write_shards(tmp_path / "set", [samples[first : first + 3] for first in range(0, count, 3)])

    def dataset(self, folder=None):
        return VilaDataset(
            Shards.of_energon(DataConfig(), str(self.shards)), TOKENIZER, DataConfig(), MODEL, SEQ_LENGTH
        )


def seen(steps):
    return [(row.row.sample_ids, np.asarray(row.pixels)[:, 0, 0, 0].tolist()) for step in steps for row in step.rows]


def test_rows_from_shards_are_those_of_the_same_records_in_a_file(tmp_path):
    shards = ShardData(tmp_path, 8)
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    files = Data(tmp_path, tmp_path, [record(n) for n in range(8)])
    (mine,), (its,) = (data.run(GridShape(), 6, batch=2) for data in (shards, files))
    assert seen(mine) == seen(its) and len({name for names, _ in seen(mine) for name in names}) == 8


def test_bad_samples_of_shards_are_left_out_on_every_rank(tmp_path):
    spoiled = {1: {"json": b"{"}, 4: {"png": b""}, 6: {"png": b"no picture"}}
    data = ShardData(tmp_path, 9, spoiled.items())
    for ranks in data.run(GridShape(dp=2), 6, batch=2):
        names = {name for step in ranks for row in step.rows for name in row.row.sample_ids}
        assert names and not names & {"p1", "p4", "p6"}


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_a_shard_that_is_lost_ends_all_ranks_with_shard_and_sample(tmp_path, change):
    data = ShardData(tmp_path, 60)
    with data.loader() as loader:
        loader.next_step()

    def use(loader, steps):
        for tar in data.shards.glob("*.tar"):
            os.truncate(tar, tar.stat().st_size + 512) if change == "longer" else tar.unlink(missing_ok=True)
        with pytest.raises(
            LoaderError, match=r"ChangedFileError: at sample 0.*\.tar: the shard (is gone|has .* bytes and had)"
        ):
            for _ in range(40):
                loader.next_step()
        return True

    assert data.run(GridShape(dp=2), 1, use, prefetch=0) == [True, True]

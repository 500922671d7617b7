"""The loader of a run on ranks that are threads, and the samples it reads."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megatron_vila.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    VisionConfig,
)
from megatron_vila.data.cards import Alone, Cards
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.held_out import HeldOutLoader
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import SampleOrder
from megatron_vila.data.row_decoder import RowDecoder
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.data.stream import Stream, StreamState
from megatron_vila.plan.flops import flop_prices
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.pictures import row_vision
from tests.data.material import byte_level_tokenizer, conversation, write_jsonl

MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=8),
    projector=ProjectorConfig(type="mlp_downsample"),
    llm=LanguageConfig(vocab_size=1000),
)
TOKENIZER = byte_level_tokenizer("qwen2")
SEQ_LENGTH = 160


def sample(name, words=1):
    field = "video" if name.endswith("mp4") else "image"
    return {"id": name, field: name, "conversations": conversation("What " * words, "A cat.")}


TEXT = {"id": "text", "conversations": conversation()}
GOOD = [
    sample("a.mp4"),
    TEXT,
    sample("b.mp4", 9),
    sample("white.png"),
    sample("c.mp4"),
    sample("short.mp4"),
    sample("d.mp4", 3),
]
BROKEN = [
    sample("a.mp4"),
    sample("cut.mp4"),
    sample("middle.mp4"),
    sample("b.mp4"),
    sample("empty.mp4"),
    sample("text.mp4"),
    sample("missing.mp4"),
    sample("c.mp4"),
    sample("bad.png"),
    sample("white.png"),
]


class Data:
    """The samples of a run, read anew by every rank."""

    def __init__(self, tmp_path, folder, records, packing=False, skip_bad=False, weights=(), parts=None, **options):
        self.files = write_jsonl(tmp_path / "train.jsonl", records)
        self.folder, self.packing, self.skip_bad = str(folder), packing, skip_bad
        self.sizes, self.weights = parts or [len(records)], weights
        self.options = {"num_frames": 8, **options}

    def dataset(self, folder=None):
        files = JsonFiles([self.files], folder or self.folder, skip_bad=self.skip_bad)
        return VilaDataset(files, TOKENIZER, DataConfig(**self.options), MODEL, SEQ_LENGTH)

    def loader(self, grid=GridShape(), rank=0, exchange=None, *, batch=2, seed=5, shuffle=True, state=None, folder=None, **more):  # noqa: B008
        dataset = self.dataset(folder)
        stream = Stream(
            SampleOrder(self.sizes, seed, shuffle, self.weights),
            Cards(len(dataset)),
            flop_prices(MODEL, OptimConfig(), pictures=True),
            rows=batch,
            packing=self.packing,
            seq_length=SEQ_LENGTH,
            vision_capacity=row_vision(dataset.pictures, SEQ_LENGTH),
        )
        options = {"workers": 2, "prefetch": 3} | more
        decoder = RowDecoder(dataset.probe, dataset.failures, image_size=32, aspect="resize", workers=options["workers"])
        state, exchange = state or StreamState(), exchange or Alone()
        return RowLoader(dataset, stream, state, grid, rank, decoder, exchange=exchange, **options)

    def held_out(self, grid=GridShape(), rank=0, agree=sorted, **more):  # noqa: B008
        dataset = self.dataset()
        decoder = RowDecoder(dataset.probe, dataset.failures, image_size=32, aspect="resize", workers=2)
        return HeldOutLoader(dataset, grid, rank, decoder, agree=agree, **({"prefetch": 3} | more))

    def run(self, grid, steps, use=None, more=lambda rank: {}, **options):
        """What ``use(loader, steps)`` gives on each rank of ``grid``: by default its steps."""
        exchanges = Exchanges(grid.world_size)

        def run(rank):
            with self.loader(grid, rank, exchanges.of(rank), **(options | more(rank))) as loader:
                return (use or all_steps)(loader, steps)

        with ThreadPoolExecutor(grid.world_size) as threads:
            results = list(threads.map(run, range(grid.world_size)))
        assert len(set(exchanges.calls.values())) == 1, "every rank has exchanged equally often"
        return results

    def block(self, ranks, steps, **options):
        """The rows that each rank of a model-parallel block gets."""
        return [[row for step in of_rank for row in step.rows] for of_rank in self.run(GridShape(tp=ranks), steps, **options)]


def all_steps(loader, steps):
    return [loader.next_step() for _ in range(steps)]


class Exchanges:
    """Exchanges of ranks that are threads. A rank that calls more or less often than the others breaks the barrier."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks)
        self.parts = [None] * ranks
        self.calls = Counter()
        self.reports = Counter()

    def of(self, rank):
        return RankExchange(self, rank)


class RankExchange:
    def __init__(self, together, rank):
        self.together, self.rank, self.ranks = together, rank, together.ranks

    def agree(self, reports):
        self.together.reports[self.rank] += len(reports)
        return sorted({report for part in self._all(("agree", reports)) for report in part})

    def gather(self, part):
        assert all(np.shape(other) == np.shape(part) for other in self._all(("shape", part)))
        return np.stack(self._all(("gather", part)))

    def _all(self, part):
        assert threading.current_thread().name.startswith("ThreadPoolExecutor"), "not a thread of the loader"
        self.together.calls[self.rank] += 1
        self.together.parts[self.rank] = part
        self.together.barrier.wait(timeout=60)
        kinds, parts = zip(*self.together.parts, strict=True)
        self.together.barrier.wait(timeout=60)
        assert len(set(kinds)) == 1, "all ranks are at the same exchange"
        return parts


def contents(row):
    """What a row holds, to compare rows: without the padding, which depends on the grid."""
    used = np.concatenate([s + np.arange(n) for s, n in zip(row.row.cu_seqlens, row.row.lengths, strict=False)])
    return (row.row.sample_ids, row.row.frames, row.row.token_ids[used].tolist(), row.row.labels[used].tolist())


def together(rows_of_ranks):
    """Rows of a block with the pixels of all its ranks, in the order of the frames."""
    for rows in zip(*rows_of_ranks, strict=True):
        assert len({repr(contents(row)) for row in rows}) == 1
        places = [place for row in rows for place in row.plan.frames]
        assert places == list(range(len(rows[0].row.frames))), "every frame is decoded once"
        yield contents(rows[0]), torch.cat([row.pixels for row in rows])

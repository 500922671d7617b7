"""The loader of a run on blocks of ranks that are threads, and the samples it reads."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megatron_vila.config.schema import DataConfig, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from megatron_vila.data.dataset import VilaDataset
from megatron_vila.data.lengths import length_table
from megatron_vila.data.loader import RowLoader
from megatron_vila.data.order import RowOrder
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.plan.grid import GridShape
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


def no_other_rank(reports):
    return reports


class Data:
    """The samples of a run, read anew by every rank."""

    def __init__(self, tmp_path, folder, records, packing=False, skip_bad=False, **options):
        self.files = write_jsonl(tmp_path / "train.jsonl", records)
        self.folder, self.packing, self.skip_bad = str(folder), packing, skip_bad
        self.options = {"num_frames": 8, **options}
        self.cache = str(tmp_path / "lengths.json")

    def loader(self, rank=0, ranks=1, agree=no_other_rank, *, batch=2, dp_rank=0, dp_size=1, seed=5, **more):
        """Of rank ``rank`` of a block of ``ranks`` tensor-parallel ranks."""
        dataset = VilaDataset(
            JsonFiles([self.files], more.pop("folder", self.folder), skip_bad=self.skip_bad),
            TOKENIZER,
            DataConfig(**self.options),
            MODEL,
            SEQ_LENGTH,
        )
        lengths = length_table(dataset, self.cache, 1) if self.packing else more.pop("lengths", None)
        order = RowOrder(len(dataset), seed, more.pop("shuffle", True), lengths, SEQ_LENGTH)

        grid = more.pop("grid", None) or GridShape(tp=ranks, dp=dp_size)
        options = {"agree": agree, "image_size": 32, "aspect": "resize", "workers": 2, "prefetch": 3}
        options |= {"rank": rank + ranks * dp_rank, "global_batch_size": batch}
        return RowLoader(dataset, order, grid, **(options | more))

    def block(self, ranks, steps, **options):
        """The rows that each rank of a model-parallel block gets in ``steps`` steps, with the number of agreements."""
        agreement = Agreement(ranks)

        def run(rank):
            with self.loader(rank, ranks, lambda reports: agreement(rank, reports), **options) as loader:
                return [row for step in range(steps) for row in loader.outcomes(step)], loader.broken

        with ThreadPoolExecutor(ranks) as threads:
            results = list(threads.map(run, range(ranks)))
        assert len({tuple(sorted(broken)) for _, broken in results}) == 1, "all ranks know the same broken samples"
        assert len(set(agreement.calls.values())) == 1, "every rank has agreed equally often"
        return [rows for rows, _ in results]


class Agreement:
    """The union over ranks that are threads. A rank that calls more or less often than the others breaks the barrier."""

    def __init__(self, ranks):
        self.barrier = threading.Barrier(ranks)
        self.reports = [None] * ranks
        self.calls = Counter()

    def __call__(self, rank, reports):
        assert threading.current_thread().name.startswith("ThreadPoolExecutor"), "not a decoding thread"
        self.calls[rank] += 1
        self.reports[rank] = reports
        self.barrier.wait(timeout=60)
        union = sorted({r for rank_reports in self.reports for r in rank_reports})
        self.barrier.wait(timeout=60)
        return union


def contents(row):
    """What a row holds, to compare rows: without the padding, which depends on the grid."""
    used = np.concatenate([s + np.arange(n) for s, n in zip(row.row.cu_seqlens, row.row.lengths, strict=False)])
    return (row.number, row.row.sample_ids, row.row.frames, row.row.token_ids[used].tolist(), row.row.labels[used].tolist())


def together(rows_of_ranks):
    """Rows of a block with the pixels of all its ranks, in the order of the frames."""
    for rows in zip(*rows_of_ranks, strict=True):
        assert len({repr(contents(row)) for row in rows}) == 1
        places = [place for row in rows for place in row.plan.frames]
        assert places == list(range(len(rows[0].row.frames))), "every frame is decoded once"
        yield contents(rows[0]), torch.cat([row.pixels for row in rows])

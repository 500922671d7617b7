"""What the tests against the independent truth share: a folder with models, records and media, the trainer's run, comparisons."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.start_checks import check_start
from megatron_vila.training.start import make_trainer
from megatron_vila.training.summary import read_metrics
from tests.training.independent import files, model
from tests.training.independent.loop import Recipe, Run
from tests.training.independent.samples import Pictures

LONGEST = 150
SHAPES = {"qwen2": model.QWEN2, "llama": model.LLAMA, "legacy": model.LEGACY}


class World:
    """A folder with media, a tokenizer, models, and the same run as settings of the trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = files.write_media(folder)
        self.tokenizer = files.write_tokenizer(folder / "tokenizer")

    def write(self, name: str, records: Sequence[dict[str, Any]]) -> str:
        """Records in a file of each kind, as the value of data.train or data.eval."""
        half = (len(records) + 1) // 2
        parts = {"json": records[:half], "jsonl": records[half:]}
        written = [files.write_records(self.folder / f"{name}.{kind}", list(part)) for kind, part in parts.items() if part]
        return f"[{','.join(written)}]"

    def imported(self, vila: model.Vila, name: str, dtype: torch.dtype = torch.float32) -> Path:
        """The run's folder of a model; the folder that it was imported from ends in .hf."""
        out = self.folder / name
        folder = model.write_folder(out.with_suffix(".hf"), vila, self.tokenizer, dtype)
        import_checkpoint(folder, out, template="")
        return out

    def random(self, shape: str) -> Path:
        """The run's folder of a random model of the kind ``shape``."""
        out = self.folder / shape
        return out if out.exists() else self.imported(model.randomized(SHAPES[shape], seed=3), shape)

    def settings(self, recipe: Recipe, pictures: Pictures, train: str, output: Path, *more: str) -> list[str]:
        return [
            f"data.train={train}",
            f"data.num_frames={pictures.num_frames}",
            f"data.fps={pictures.fps}",
            f"data.fps_rule={pictures.rule}",
            f"data.image_aspect={pictures.aspect}",
            f"data.frame_separator_ids={list(pictures.frame_separator)}",
            f"data.image_separator_ids={list(pictures.image_separator)}",
            f"train.steps={recipe.steps}",
            f"train.global_batch_size={recipe.rows}",
            f"train.seed={recipe.seed}",
            f"train.seq_length={LONGEST}",
            f"train.output={output}",
            "train.precision=fp64",
            f"optim.lr={recipe.lr}",
            *(f"optim.{part}.lr={rate}" for part, rate in recipe.rates.items()),
            *(f"optim.{part}.trainable=false" for part in recipe.frozen),
            f"optim.min_lr={recipe.min_lr}",
            f"optim.schedule={recipe.schedule}",
            f"optim.warmup_steps={recipe.warmup}",
            "optim.warmup_fraction=0",
            f"optim.weight_decay={recipe.weight_decay}",
            f"optim.beta1={recipe.beta1}",
            f"optim.beta2={recipe.beta2}",
            f"optim.eps={recipe.eps}",
            f"optim.clip_grad={recipe.clip}",
            *more,
        ]


def trained(rank: int, config: Path | str, settings: Sequence[str]) -> dict[str, Any]:
    """The summary of a run of the real trainer, as ``python -m megatron_vila.train`` would make it."""
    config = load_config(str(config), settings)
    check_start(config, torch.distributed.get_world_size(), accelerator.machine())
    try:
        return make_trainer(config).run()
    finally:
        accelerator.set_deterministic(False)


def cut_back(output: Path, step: int) -> None:
    """Leave of a run what a kill just after the checkpoint of ``step`` would have left, and lines of steps after it."""
    for folder in (output / "checkpoints").glob("step-*"):
        if folder.name != f"step-{step:08d}":
            shutil.rmtree(folder)
    (output / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def weights_of(checkpoint: Path, out: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint by the names of published files."""
    found = {}
    export_checkpoint(checkpoint, out, dtype=dtype)
    for part in ("llm", "vision_tower", "mm_projector"):
        for name, tensor in load_file(out / part / "model.safetensors").items():
            found[f"{part}.{name}"] = tensor
    return found


def same_steps(output: Path, wanted: Sequence[dict[str, Any]]) -> None:
    found, _ = read_metrics(output)
    assert [record["step"] for record in found] == [record["step"] for record in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        for key, value in theirs.items():
            same = mine[key] is None if value is None else mine[key] == pytest.approx(value, rel=1e-8, abs=1e-12)
            assert same, (theirs["step"], key, mine[key], value)
        assert {key for key in mine if key.startswith("lr_")} == {key for key in theirs if key.startswith("lr_")}


def same_totals(summary: dict[str, Any], wanted: Sequence[dict[str, Any]]) -> None:
    """The summary of a run, which a resume must not shorten."""
    for key in ("tokens", "frames"):
        assert summary[key] == sum(step[key] for step in wanted), key
    assert (summary["steps"], summary["skipped"]) == (len(wanted), wanted[-1]["skipped"])
    assert summary["loss"] == pytest.approx(wanted[-1]["loss"], rel=1e-8)


def same_weights(found: dict[str, torch.Tensor], run: Run) -> None:
    mine = run.model.tensors()
    assert sorted(found) == sorted(mine)
    for name, tensor in mine.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")

"""The scripts with Trainer, TRL and accelerate under MM-SP: each trains Qwen2.5-VL on videos that are read lazily."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_vila.data.synthetic import write_synthetic_set
from megatron_vila.data.video import decode_video_frames
from megatron_vila.hf.mm_sp import enable_mm_sp
from tests.hf.mm_sp_cases import build, text_sample
from tests.hf.mm_sp_trainer_ranks import launched
from tests.ranks import pool

EXAMPLE = Path(__file__).parents[2] / "examples/hf_mm_sp"


def run_script(rank: int, name: str, arguments: list[str]) -> None:
    """A script of the example in one of the processes that ``torchrun`` would start."""
    before = sys.argv, sys.path
    with launched(rank):
        try:
            sys.argv, sys.path = [name, *arguments], [str(EXAMPLE), *sys.path]
            runpy.run_path(str(EXAMPLE / name))["main"]()
        finally:
            sys.argv, sys.path = before


@pytest.mark.parametrize(
    "name, layout, saved",
    [("trainer.py", "--ulysses", "trainer"), ("sft_trl.py", "--ring", "sft"), ("accelerate_fsdp2.py", "--ring", "accelerate")],
)
def test_each_script_trains_qwen_on_videos_and_saves_it(name, layout, saved, tmp_path):
    arguments = [layout, "2", "--frames", "4", "--steps", "2", "--workers", "0", "--lr", "0.01", "--out", str(tmp_path)]
    pool.run(2, run_script, name, arguments)
    if saved == "sft":
        weights = load_file(tmp_path / saved / "adapter_model.safetensors")
        assert all(weight.abs().max() > 0 for weight in weights.values())
        return
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / saved)
    fresh = qwen_video().build_model(Namespace(model=None), model.config.text_config.vocab_size - 4)
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, fresh.state_dict()[key])}
    # Queries do not depend on a bias of all keys.
    assert {key for key in fresh.state_dict() if not key.endswith("k_proj.bias")} <= changed


def with_prepared_loader(rank: int) -> str:
    with launched(rank):
        mm_sp = enable_mm_sp(model := build("qwen2"), ulysses=2)
        samples = [text_sample(seed, 9) for seed in range(4)]
        loader = Accelerator(cpu=True).prepare(DataLoader(samples, 1, collate_fn=mm_sp.collator()))
        with pytest.raises(ValueError) as error:
            model(**next(iter(loader)))
    return str(error.value)


def test_a_loader_that_accelerate_has_prepared_is_refused():
    for said in pool.run(2, with_prepared_loader):
        assert "leave the loader out of accelerate's prepare" in said


def qwen_video():
    spec = importlib.util.spec_from_file_location("hf_mm_sp_qwen_video", EXAMPLE / "qwen_video.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patches_are_those_of_the_models_own_processor_and_are_read_in_parts(tmp_path):
    module = qwen_video()
    write_synthetic_set(tmp_path, [5], train=1, evaluation=0)
    (record,) = json.loads((tmp_path / "train_5.json").read_text())
    path = str(tmp_path / record["video"])
    video = module.VideoPatches(path, 5, 84, Qwen2_5_VLConfig())
    assert video.grid == (3, 6, 6) and len(video) == 108 and video.tokens == 27
    stock = Qwen2VLImageProcessorPil(do_resize=False)
    frames = [frame.resize((84, 84)) for frame in decode_video_frames(path, [0, 1, 2, 3, 4])]
    # The processor of pictures shows each one twice, where a video shows two frames.
    twice = stock(frames, return_tensors="pt")["pixel_values"].view(5, 36, 3, 2, 14, 14)
    for step, (first, second) in enumerate([(0, 1), (2, 3), (4, 4)]):
        wanted = torch.stack([twice[first][:, :, 0], twice[second][:, :, 1]], dim=2)
        found = video[36 * step : 36 * step + 36]
        assert torch.allclose(found, wanted.flatten(1), atol=1e-6)

"""The trainer against a run that shares nothing with it: losses, rates, norms, counts, FLOPs and weights after five steps.

Both sides read the same weights (a Hugging Face folder), records, videos and pictures. ``tests/training/independent`` is what the
other side is made of.
"""

import ast
from pathlib import Path

import pytest
import torch

from megatron_vila import accelerator
from megatron_vila.config.load import load_config
from megatron_vila.training.trainer import Trainer
from tests.ranks import pool
from tests.training.independent import files, model
from tests.training.independent.data import Rows
from tests.training.independent.loop import Recipe, Run
from tests.training.independent.samples import Pictures
from tests.training.truth_sides import (
    LONGEST,
    SHAPES,
    World,
    same_steps,
    same_totals,
    same_weights,
    trained,
    weights_of,
)

RECORDS = [
    files.record("video", "<video>\nWhich colour?", " Red, é. ", video="long.mp4"),
    files.record("picture", "Day?\n<image>", "No.", image="wide.jpg"),
    files.record("text", " Say <|im_end|>.", "a", "And b,\nthen c.", "b\nc"),
    files.record("both", "Look:\n<video>\nSame? ", "Yes", "<image>", "No.", image="turned.jpg", video="short.mp4"),
    files.record("still", "Who?", "Nobody at all", image="turned.jpg"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_the_truth_imports_nothing_of_what_it_judges():
    for path in (Path(__file__).parent / "independent").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if "megatron" in n or (n.startswith("tests") and "training.independent" not in n)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_truth_is_the_stock_model_but_for_the_float32_inside_of_it(world, shape):
    exact = model.randomized(SHAPES[shape], seed=1)
    stock = model.Vila(SHAPES[shape], exact=False)
    stock.load_state_dict(exact.state_dict(), strict=False)
    (sample,) = Rows(RECORDS[3:4], world.folder, Pictures(), LONGEST, seed=0)(0)
    with torch.no_grad():
        ours, theirs = (vila(torch.tensor(sample.ids), sample.pixels) for vila in (exact, stock))
    assert (ours - theirs).abs().max() <= 2e-5 * ours.abs().max()


CASES = {
    "qwen2": ("qwen2", Recipe(), Pictures(), 1, ()),
    "llama pad": (
        "llama",
        Recipe(schedule="constant", rows=3, seed=5, frozen=("vision",), rates={"projector": 0.017}, warmup=1, clip=0.0),
        Pictures(aspect="pad", num_frames=4, frame_separator=(), image_separator=()),
        1,
        (),
    ),
    "legacy fps": (
        "legacy",
        Recipe(frozen=("llm",), rates={"vision": 0.004}, warmup=0, seed=8, rows=4),
        Pictures(fps=2.0, hermes=True),
        2,
        ("parallel.ulysses=2", "data.template=hermes-2"),
    ),
    "packed": (
        "qwen2",
        Recipe(rows=2, seed=11),
        Pictures(num_frames=3, fps=3.0, rule="first"),
        1,
        ("data.packing=true",),
    ),
    "packed dp ring": (
        "llama",
        Recipe(rows=4, seed=31, frozen=("projector",), rates={"llm": 0.008}),
        Pictures(),
        4,
        ("data.packing=true", "parallel.ring=2"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_from_imported_weights_is_that_of_stock_modules(world, tmp_path, name):
    shape, recipe, pictures, processes, more = CASES[name]
    imported, files_of_it = world.random(shape), world.write("plain", RECORDS)
    settings = world.settings(recipe, pictures, files_of_it, tmp_path / "run", *more)
    summary, *_ = pool.run(processes, trained, imported / "config.yaml", settings)
    rows = Rows(RECORDS, world.folder, pictures, LONGEST, recipe.seed, "data.packing=true" in more, recipe.rows)
    truth = Run(model.Vila(SHAPES[shape]).load(imported.with_suffix(".hf")), recipe, rows)
    wanted = [truth.step() for _ in range(recipe.steps)]
    same_steps(tmp_path / "run", wanted)
    same_totals(summary, wanted)
    same_weights(weights_of(tmp_path / "run", tmp_path / "out"), truth)


FRESH = [
    "model.name=fresh", "model.init_std=0.35",
    "model.llm.num_layers=3", "model.llm.hidden_size=24", "model.llm.num_heads=4", "model.llm.num_kv_heads=2",
    "model.llm.head_dim=8", "model.llm.ffn_hidden_size=28", "model.llm.vocab_size=259", "model.llm.norm_eps=0.02",
    "model.llm.qkv_bias=false", "model.llm.tie_embeddings=true", "model.llm.rope_theta=211",
    "model.llm.rope_scaling_factor=1", "model.llm.max_positions=1024",
    "model.vision.hidden_size=12", "model.vision.num_layers=3", "model.vision.num_heads=3",
    "model.vision.ffn_hidden_size=20", "model.vision.image_size=30", "model.vision.patch_size=7",
    "model.vision.select_layer=-3", "model.vision.use_head=false", "model.vision.layer_norm_eps=0.03",
    "model.projector.type=mlp_downsample_3x3_fix",
]  # fmt: skip
"""``model.LLAMA`` in the trainer's own settings."""


def initial(rank, settings):
    """The weights that a run begins with."""
    trainer = Trainer(load_config("tiny", settings))
    accelerator.set_deterministic(False)
    return {name: parameter.detach().clone() for name, parameter in trainer.model.module.named_parameters()}


def test_a_fresh_run_begins_with_weights_of_its_seed_and_goes_on_as_stock_modules_do(world, tmp_path):
    recipe, pictures = Recipe(warmup=1), Pictures()
    data, tokenizer = world.write("plain", RECORDS), f"data.tokenizer={world.tokenizer}"
    more = (*FRESH, tokenizer, "checkpoint.save_every=1", "checkpoint.keep=0")
    settings = world.settings(recipe, pictures, data, tmp_path / "run", *more)
    pool.run(1, trained, "tiny", settings)
    # The rate of the first step is 0: what was saved after it are the weights that the run began with.
    start = weights_of(tmp_path / "run/checkpoints/step-00000001", tmp_path / "start")
    for name, weight in start.items():
        std = 0.35 / 6**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.35
        if weight.dim() == 1:
            assert (weight == (1 if name.endswith("weight") else 0)).all(), name
        elif weight.numel() > 200:
            assert weight.std() == pytest.approx(std, rel=0.15) and abs(weight.mean()) < 0.1 * std + 0.01, name
    rows = Rows(RECORDS, world.folder, pictures, LONGEST, recipe.seed)
    truth = Run(model.Vila(model.LLAMA).load(tmp_path / "start"), recipe, rows)
    same_steps(tmp_path / "run", [truth.step() for _ in range(recipe.steps)])
    same_weights(weights_of(tmp_path / "run", tmp_path / "out"), truth)
    seeds = [pool.run(1, initial, [*settings, "checkpoint.resume=false", f"train.seed={seed}"])[0] for seed in (29, 30)]
    for name, weight in seeds[0].items():
        assert weight.dim() == 1 or not torch.isclose(weight, seeds[1][name]).any(), name


def test_a_bf16_run_updates_float32_copies_of_the_weights_that_it_was_given(world, tmp_path):
    """Copies of other weights (those drawn before the load) would be as far away as the weights are large."""
    recipe, pictures = Recipe(steps=2, warmup=0), Pictures()
    rounded = model.randomized(model.QWEN2, seed=4).bfloat16().double()
    imported = world.imported(rounded, "bf16", torch.bfloat16)
    settings = world.settings(recipe, pictures, world.write("plain", RECORDS), tmp_path / "run", "train.precision=bf16")
    pool.run(1, trained, imported / "config.yaml", settings)
    before = {name: weight.detach().clone() for name, weight in rounded.tensors().items()}
    truth = Run(rounded, recipe, Rows(RECORDS, world.folder, pictures, LONGEST, recipe.seed))
    for _ in range(recipe.steps):
        truth.step()
    found = weights_of(tmp_path / "run", tmp_path / "out", dtype="fp32")
    apart = sum((found[name] - weight.detach()).square().sum() for name, weight in rounded.tensors().items()) ** 0.5
    moved = sum((before[name] - weight.detach()).square().sum() for name, weight in rounded.tensors().items()) ** 0.5
    assert apart <= 0.1 * moved

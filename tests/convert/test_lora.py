"""LoRA leaves a checkpoint merged or as a PEFT adapter, from any layout."""

import json
from dataclasses import asdict

import pytest
import torch

from megatron_vila.checkpoint.save_load import save_checkpoint
from megatron_vila.convert.errors import ConversionError
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.stored_model import StoredModel
from tests.convert import material
from tests.ranks import pool
from tests.training.small_run import build

LORA = {
    "model__lora__rank": 2,
    "model__lora__alpha": 6.0,
    "model__lora__targets": ["qkv", "proj", "fc1", "fc2"],
}


def train(rank, layout, folder, changes):
    run = build(layout, **changes)
    for step in range(3):
        run.step(step)
    save_checkpoint(folder, 3, [run.ddp], run.optimizer, run.scheduler, info={"config": asdict(run.config)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    pool.run(1, train, (1, 1, 1, 1), str(folder), LORA)
    return folder


def adapted(folder, base, config):
    """The base weights with an adapter applied as PEFT's documentation says: W + alpha / r * B A."""
    factors = material.read_tensors(folder)
    scale = config["lora_alpha"] / config["r"]
    merged = dict(base)
    for name in [n for n in factors if n.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
        merged[f"llm.{module}.weight"] = (base[f"llm.{module}.weight"].double() + scale * update).float()
    return merged


def test_an_adapter_on_the_base_is_the_merged_export(tmp_path, run):
    merged = material.read_tensors(export_checkpoint(run, tmp_path / "merged"))
    adapter = export_checkpoint(run, tmp_path / "adapter", adapter=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (2, 6.0, None)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    plain = StoredModel(run, merge=False)
    base = {name: plain.read(name) for name in plain.infos}
    expected = adapted(adapter, base, config)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    moved = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], base[name])}
    assert moved == set(names)


@pytest.mark.parametrize(
    "layout", [(2, (2, 1, 1, 1)), (2, (1, 2, 1, 1)), (4, (2, 1, 1, 2))], ids=["tp2", "pp2", "tp2-ring2"]
)
def test_every_layout_exports_the_same_merged_model(tmp_path, run, layout):
    pool.run(layout[0], train, layout[1], str(tmp_path / "run"), LORA)
    one = material.read_tensors(export_checkpoint(run, tmp_path / "one"))
    other = material.read_tensors(export_checkpoint(tmp_path / "run", tmp_path / "other"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6, msg=name)


def test_weights_trained_whole_beside_the_lora_go_into_the_adapter_unless_they_are_tied(tmp_path):
    changes = LORA | {"model__lora__also_train": ["embeddings", "norms"]}
    pool.run(1, train, (1, 1, 1, 1), str(tmp_path / "run"), changes)
    adapter = export_checkpoint(tmp_path / "run", tmp_path / "adapter", adapter=True)
    saved = json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"]
    assert saved == ["embed_tokens", "input_layernorm", "norm", "post_attention_layernorm"]
    whole = material.read_tensors(adapter)
    merged = material.read_tensors(export_checkpoint(tmp_path / "run", tmp_path / "merged"))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(whole[f"base_model.model.{name}"], merged[f"llm.{name}"])
    pool.run(1, train, (1, 1, 1, 1), str(tmp_path / "tied"), changes | {"tied": True})
    with pytest.raises(ConversionError, match="is tied to the output layer .*which PEFT would untie; export without"):
        export_checkpoint(tmp_path / "tied", tmp_path / "refused", adapter=True)

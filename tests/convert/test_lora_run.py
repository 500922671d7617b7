"""A model with LoRA in a tensor- and pipeline-parallel layout, exported merged: the import of the export computes the same."""

import pytest
import torch

from megatron_vila.checkpoint.save_load import load_checkpoint, read_info, save_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import LoraConfig, ParallelConfig
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.models.initialize import global_name, tensor_parallel_slice
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import pack
from tests import samples
from tests.convert import material
from tests.parallel import contract
from tests.ranks import pool

LORA = LoraConfig(rank=3, alpha=5.0, targets=["qkv", "proj", "fc1", "fc2"])


def build(imported, lora, layout):
    config = load_config(f"{imported}/config.yaml", ["model.attention=cpu"])
    config.parallel, config.model.lora = ParallelConfig(*layout), lora
    topology = ParallelTopology.create(config.parallel)
    return config, topology, VilaModel(config, topology, torch.float32, torch.device("cpu"))


def save_with_updates(rank, imported, output, layout):
    config, topology, model = build(imported, LORA, layout)
    load_checkpoint(config.checkpoint.load, [model])
    grid, place = topology.grid, topology.place
    with torch.no_grad():
        for local, parameter in model.named_parameters():
            if local.endswith("lora_b"):
                name = global_name(local, place.pp * config.model.llm.num_layers // grid.pp)
                shape = list(parameter.shape)
                shape[0] *= grid.tp if getattr(parameter, "tensor_model_parallel", False) else 1
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + int(name.split(".")[3])))
                parameter.copy_(tensor_parallel_slice(noise * 0.3, name, parameter, grid.tp, place.tp))
    info = read_info(imported)
    info["config"]["model"]["lora"] = vars(LORA)
    save_checkpoint(output, 3, [model], info={"config": info["config"], "hugging_face": info["hugging_face"]})
    topology.destroy()


def loss(rank, imported, checkpoint, lora):
    config, topology, model = build(imported, lora, (1, 1, 1, 1))
    load_checkpoint(checkpoint, [model])
    row = pack([samples.document("text", "t" * 30)], 2, 2)
    llm = config.model.llm
    shard = contract.shard_of(row, topology, llm, torch.float32)
    side = config.model.vision.image_size
    topology.destroy()
    return model(shard, contract.made(model, torch.zeros(0, 3, side, side))).loss_sum.item()


def test_the_merged_export_computes_what_the_model_with_updates_computes(tmp_path):
    imported = str(import_checkpoint(material.write_vila(tmp_path / "source", "longvila-7b"), tmp_path / "imported"))
    pool.run(4, save_with_updates, imported, str(tmp_path / "run"), (2, 2, 1, 1))
    (wanted,) = pool.run(1, loss, imported, str(tmp_path / "run"), LORA)
    (base,) = pool.run(1, loss, imported, imported, LoraConfig())
    again = str(import_checkpoint(export_checkpoint(tmp_path / "run", tmp_path / "out"), tmp_path / "again"))
    (merged,) = pool.run(1, loss, again, again, LoraConfig())
    assert merged == pytest.approx(wanted, rel=1e-6)
    assert abs(base - wanted) > 1e-2 * abs(wanted)

"""Imported weights load under every layout, and what a layout saves is exported by one process."""

import pytest
import torch

from megatron_vila import accelerator
from megatron_vila.checkpoint.save_load import load_checkpoint, read_info, save_checkpoint
from megatron_vila.config.load import load_config
from megatron_vila.config.schema import ParallelConfig
from megatron_vila.convert.exporter import export_checkpoint
from megatron_vila.convert.importer import import_checkpoint
from megatron_vila.convert.stored_model import StoredModel
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from tests.convert import material
from tests.ranks import pool

LAYOUTS = {
    "tp2": (2, (2, 1, 1, 1)),
    "pp2": (2, (1, 2, 1, 1)),
    "ulysses2": (2, (1, 1, 2, 1)),
    "ring2": (2, (1, 1, 1, 2)),
    "tp2-pp2": (4, (2, 2, 1, 1)),
    "tp2-ring2": (4, (2, 1, 1, 2)),
}


def load_and_save(rank, imported, layout, output):
    """A run that starts from an import: the weights of this rank's part are loaded and saved again in its layout."""
    config = load_config(f"{imported}/config.yaml", ["train.seed=7"])
    config.parallel = ParallelConfig(*layout)
    topology = ParallelTopology.create(config.parallel)
    model = VilaModel(config, topology, torch.bfloat16, accelerator.device())
    load_checkpoint(config.checkpoint.load, [model])
    info = read_info(imported)
    save_checkpoint(output, 3, [model], info={"config": info["config"], "hugging_face": info["hugging_face"]})
    return topology.grid.world_size


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_import_loads_under_every_layout_and_is_exported_from_it_bitwise(tmp_path, name):
    world, layout = LAYOUTS[name]
    family = "longvila-1.5b" if "pp2" in name else "vila-1.5"
    imported = import_checkpoint(material.write_vila(tmp_path / "source", family), tmp_path / "imported")
    assert pool.run(world, load_and_save, str(imported), layout, str(tmp_path / "run")) == [world] * world
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert material.same_bits(material.model_tensors(family), material.read_tensors(out))


def test_untied_biased_and_without_a_head_from_tp2_pp2(tmp_path):
    imported = import_checkpoint(material.write_vila(tmp_path / "source", "nvila-lite"), tmp_path / "imported")
    pool.run(4, load_and_save, str(imported), LAYOUTS["tp2-pp2"][1], str(tmp_path / "run"))
    out = export_checkpoint(tmp_path / "run", tmp_path / "out", layout="flat")
    assert material.same_bits(material.model_tensors("nvila-lite"), material.read_tensors(out))


def test_a_table_padded_for_three_tensor_parallel_ranks_is_cut_to_its_rows(tmp_path, monkeypatch):
    """Three does not divide the usual padding: this layout pads further, loads less and saves more."""
    shape = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3}
    llm = material.LLAMA | shape
    monkeypatch.setitem(material.FAMILIES, "three", material.FAMILIES["vila-1.5"] | {"llm": llm})
    imported = import_checkpoint(material.write_vila(tmp_path / "source", "three"), tmp_path / "imported")
    pool.run(3, load_and_save, str(imported), (3, 1, 1, 1), str(tmp_path / "run"))
    stored = StoredModel(tmp_path / "run")
    assert stored._stored["llm.output_layer.weight"].shape[0] == 192
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert material.same_bits(material.model_tensors("three"), material.read_tensors(out))

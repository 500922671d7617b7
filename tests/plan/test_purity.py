"""The plan computes with what it is given: it needs no torch, starts nothing, and looks at no file, socket or machine."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import builtins, io, os, socket, subprocess, sys

# Packages of others may read their own files; they come first.
import numpy
sys.modules["torch"] = None  # an import of it fails

def refused(*arguments, **options):
    raise AssertionError(f"the plan has asked the machine: {arguments}")

for place, names in (
    (builtins, ("open",)), (io, ("open",)), (socket, ("socket", "gethostname")), (subprocess, ("Popen",)),
    (os, ("open", "stat", "lstat", "listdir", "scandir", "getcwd", "sysconf", "cpu_count", "fork", "getenv")),
):
    for name in names:
        setattr(place, name, refused)

from megatron_vila.config.schema import Config
from megatron_vila.plan import (
    activations, bounds, budgets, cache_memory, chunks, dealing, flops, frames, geometry, grid, hardware, heads, layouts, memory,
    packing, pictures, row, row_plan, sizes, step_traffic, tokens, traffic, validate, windows,
)
used = {name for name in sys.modules if name.startswith("megatron_vila.plan.")}

config = Config()
config.parallel.ulysses, config.parallel.ring, config.train.global_batch_size = 2, 2, 4
machine = hardware.machine_of("h200")
assert validate.validate(config, 16, machine) == []
print(memory.describe_memory(config, 16, machine))
assert list(bounds.size_problems(config)) == []
assert layouts.nearest_layouts(config.model.llm, layouts.Layout.of(config.parallel), 24)
assert activations.activations(config, 4, 2, machine.gpu_bytes).llm > 0
assert budgets.frames_at_once(config.model.vision, True, 2, machine.gpu_bytes) >= 1
units = pictures.pictures_of(config.model).units(8, True)
found = flops.model_flops([4096], 100, units, config.model, config.optim)
assert flops.mfu(found.total, 1.0, 16, machine.peak_flops) > 0

shape = grid.GridShape.of(16, ulysses=2, ring=2)
each = geometry.tokens_per_square(config.model.vision, config.model.projector)
refs = row.references("video", range(8), True, units)
ids = numpy.full(8 * each, row.MEDIA_TOKEN)
document = row.Document(ids, numpy.full(len(ids), row.IGNORE), refs, each * numpy.arange(8), "a video")
packed = row.pack([document], shape.document_multiple, shape.row_multiple)
assert frames.deal_frames([f.cost for f in refs], shape.encoders)[-1] == 8
plan = row_plan.RowPlan.of(packed, shape)
assert dealing.deal_rows([1, 2], 2) == [[0], [1]] and packing.pack_samples([4, 4], [0, 0], 2, 4, 1) == [[0], [1]]
assert sum(len(plan.shard(rank).frames) for rank in range(shape.encoders)) == 8
assert isinstance(plan.reshard, tokens.ReshardPlan)
assert step_traffic.step_traffic(config, plan, machine) and step_traffic.step_flop_seconds(config, plan, machine.peak_flops) > 0
nodes = numpy.array(traffic.block_ranks(shape)) // 2
for sent in (
    *traffic.reshard_bytes(plan.reshard, 64, 2),
    *traffic.tensor_bytes(shape, config.model.llm, packed.length, 2),
    *traffic.ulysses_bytes(shape, config.model.llm, packed.length, 2),
    *traffic.ring_bytes(shape, config.model.llm, packed.length, 2),
):
    traffic.Links.of(sent, nodes)
rows = packing.pack_samples([5, 3, 4], [0, 0, 0], 2, 8, 100)
assert dealing.deal_rows([len(places) for places in rows], 2)
assert heads.HeadSplit(28, 4, 2).per_rank == 14
assert [part.causal for part in windows.window_parts((8,), 1, 0, 0, 16)] == [True, False, True]
assert len(chunks.cut(document, 4 * each)) == 2
assert cache_memory.cache_memory(config, "fp8", 8192, 2, machine.gpu_bytes).tokens_on(machine.gpu_bytes) > 10**6
print(sorted(name.rpartition(".")[2] for name in used))
print("no megatron, no processes:", not {"megatron", "multiprocessing", "transformers", "omegaconf"} & set(sys.modules))
"""


def test_the_whole_plan_is_made_without_torch_a_process_or_a_look_at_the_file_system():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, modules, clean = done.stdout.splitlines()
    assert modules == str(sorted(path.stem for path in (ROOT / "megatron_vila/plan").glob("*.py") if path.stem != "__init__"))
    assert clean == "no megatron, no processes: True"

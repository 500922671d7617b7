"""Memory and time of importing, exporting and verifying a model of full size with random weights, as a Markdown table.

Needs three times the model's size on the disk of SCRATCH, which is emptied again.
Example: python tools/measure_conversion.py models/longvila-7b /tmp/conversion
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="preset or YAML file of the model")
    parser.add_argument("scratch", type=Path, help="folder to make, fill and delete")
    options = parser.parse_args()
    folder: Path = options.scratch
    folder.mkdir(parents=True)
    try:
        _in_a_process(make_random_model, options.model, folder / "vila")
        size = sum(file.stat().st_size for file in (folder / "vila").rglob("*.safetensors"))
        print(f"{options.model}: {size / 1e9:.2f} GB of weights in bfloat16\n")
        print("| step | time | peak resident memory | part of the weights |\n|---|---|---|---|", flush=True)
        for name, step, paths in (
            ("import", convert_in, ("vila", "imported")),
            ("export", convert_out, ("imported", "exported")),
            ("verify", compare, ("vila", "exported")),
        ):
            seconds, peak = _in_a_process(step, *(folder / path for path in paths))
            print(f"| {name} | {seconds:.0f} s | {peak / 1e9:.2f} GB | {peak / size:.2f} |", flush=True)
    finally:
        shutil.rmtree(folder)


def make_random_model(preset: str, folder: Path) -> None:
    """A folder in VILA's layout, written tensor by tensor."""
    import torch

    from megatron_vila.config.load import load_config
    from megatron_vila.convert import hf_config_out as hf
    from megatron_vila.convert.hf_sections import PARTS
    from megatron_vila.convert.tensor_files import TensorInfo, write_tensors
    from megatron_vila.convert.weight_map import shapes

    config = load_config(preset)
    model, dtype = config.model, torch.bfloat16
    configs = {
        "llm": hf.language_config(model.llm, {}, "bfloat16", None),
        "vision_tower": hf.vision_config(model.vision, {}, "bfloat16"),
        "mm_projector": hf.projector_config(model.projector.type, "bfloat16"),
    }
    sizes = shapes(model)
    for part in PARTS:
        infos = {n.removeprefix(f"{part}."): TensorInfo(dtype, s) for n, s in sizes.items() if n.startswith(f"{part}.")}
        (folder / part).mkdir(parents=True)
        write_tensors(
            folder / part,
            "model",
            infos,
            lambda name, infos=infos: torch.empty(infos[name].shape, dtype=dtype).normal_(std=0.02),
        )
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
    root = hf.vila_root(config, {}, configs, tokenizer=None, trained=False)
    (folder / "config.json").write_text(json.dumps(root))


def convert_in(source: Path, out: Path) -> None:
    from megatron_vila.convert.importer import import_checkpoint

    import_checkpoint(source, out)


def convert_out(checkpoint: Path, out: Path) -> None:
    from megatron_vila.convert.exporter import export_checkpoint

    export_checkpoint(checkpoint, out)


def compare(a: Path, b: Path) -> None:
    from megatron_vila.convert.verify import verify

    report = verify(a, b)
    if not report.equal:
        raise RuntimeError(str(report))


def _in_a_process(step: Callable[..., None], *arguments: object) -> tuple[float, int]:
    """Seconds and peak resident bytes of ``step`` in a process of its own, imports included in the bytes only."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measured, args=(there, step, *arguments))
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        sys.exit(f"{step.__name__} failed")
    finally:
        process.join()
    return result


def _measured(pipe: Connection, step: Callable[..., None], *arguments: object) -> None:
    from megatron_vila import accelerator

    accelerator.prepare()
    import megatron_vila.convert.importer  # noqa: F401

    started_s = time.perf_counter()
    step(*arguments)
    seconds = time.perf_counter() - started_s
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


if __name__ == "__main__":
    main()

"""``python -m megatron_vila.explain CONFIG [KEY=VALUE ...]``: the layout of a run, with no process started and no GPU used.

CONFIG             a YAML file or a preset, e.g. longvila-7b-stage5
world_size=256     ranks to explain (default: one replica)
sample=3           sample number 3 of data.train: where its frames and tokens go and what travels
frames=600         a made-up video of 600 frames ...
text=2000          ... with 2000 text tokens
parallel.tp=4 ...  any key of the configuration
--gpu h200         GPU planned for: a100, b200, gb200, h100, h200 or its memory, e.g. 80GB (default: this machine's, else 80GB);
                   with a name, what a step sends over each link and the least time that takes are predicted
--all-ranks        every rank of a sample's table, not the first and last ones
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_vila.config.load import load_config
from megatron_vila.config.schema import Config
from megatron_vila.errors import ConfigError, entry_point
from megatron_vila.explain.grid import explain_grid, explain_model, explain_tokens
from megatron_vila.explain.sample import explain_sample, left_out, made_up_document, require_sample
from megatron_vila.explain.step import explain_step, full_document
from megatron_vila.explain.text import console
from megatron_vila.plan.bounds import MOST
from megatron_vila.plan.grid import GridShape, Layout
from megatron_vila.plan.row import Document, pack
from megatron_vila.plan.row_plan import RowPlan
from megatron_vila.plan.validate import validate
from megatron_vila.start_checks import planned_machine

OWN_KEYS = {
    "world_size": 10**15,
    "sample": 10**15,
    "frames": MOST["data.num_frames"],
    "text": MOST["train.seq_length"],
}
"""Keys of this command alone, and the largest value that can be meant."""


@entry_point
def main(arguments: Sequence[str]) -> int:
    """Print the explanation of the command line ``arguments``; returns the exit status (2: bad input)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--all-ranks", action="store_true")
    options, settings = parser.parse_known_args(arguments)
    if options.help or not settings:
        print(__doc__)
        return 0 if options.help else 2
    name, *rest = settings
    own, overrides = _split(rest)
    config, machine = load_config(name, overrides), planned_machine(options.gpu)
    parallel = config.parallel
    world_size = own.get("world_size", Layout.of(parallel).size)
    warnings = validate(config, world_size, machine)
    grid = GridShape.of(world_size, parallel.tp, parallel.pp, parallel.ulysses, parallel.ring)
    document, note = _document(config, own)
    out = console(sys.stdout)
    explain_grid(out, config, grid)
    explain_model(out, config, grid, machine)
    explain_tokens(out, config, grid)
    plan = RowPlan.of(pack([document or full_document(config)], grid.document_multiple, grid.row_multiple), grid)
    if document is not None:
        explain_sample(out, config, plan, note, options.all_ranks)
    explain_step(out, config, plan, machine)
    for warning in warnings:
        out.print(f"warning: {warning}", style="yellow")
    return 0


def _split(arguments: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The command's own keys as numbers, and the overrides of the configuration."""
    own, overrides = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in OWN_KEYS or not equals:
            overrides.append(argument)
            continue
        least = 1 if name == "world_size" else 0
        if not value.isdecimal() or len(value) > 18 or not least <= int(value) <= OWN_KEYS[name]:
            raise ConfigError(f"command line: {argument} must be a whole number from {least} to {OWN_KEYS[name]}")
        own[name] = int(value)
    if "sample" in own and ("frames" in own or "text" in own):
        raise ConfigError(
            "command line: sample=N takes a sample of data.train, frames= and text= make one up; give one only"
        )
    return own, overrides


def _document(config: Config, own: dict[str, int]) -> tuple[Document | None, str]:
    """The sample that the command line asks for, and what training would do to it (empty: nothing)."""
    if "sample" in own:
        return _sample_of_the_data(config, own["sample"])
    if "frames" not in own and "text" not in own:
        return None, ""
    frames, text = own.get("frames", 0), own.get("text", 64)
    if not frames and not text:
        raise ConfigError("command line: frames=0 text=0 is not a sample; give at least one token")
    document = made_up_document(config, frames, text)
    if len(document) <= config.train.seq_length:
        return document, ""
    fate = f"training would {config.data.over_long} it; shown whole"
    return document, f"longer than train.seq_length={config.train.seq_length}: {fate}"


def _sample_of_the_data(config: Config, index: int) -> tuple[Document, str]:
    # Slow to import and needed for real samples only.
    from megatron_vila.data.check import problem_of
    from megatron_vila.training.run_data import open_dataset

    dataset = open_dataset(config, "train")
    require_sample(dataset, index, f"sample={index}", "train")
    problem, sample, notes = problem_of(dataset, index, decode=False), dataset.first_usable(index), []
    if problem is not None:
        kind = problem.kind.replace("_", " ")
        notes.append(f"sample {index} cannot be used ({kind}) and is left out; shown is sample {sample.index}: {problem.reason}")
    return sample.document, "; ".join([*notes, *left_out(sample, config.train.seq_length)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

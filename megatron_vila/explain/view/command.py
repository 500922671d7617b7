"""The command line of ``tools/view_data.py``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vila.busy import counted
from megatron_vila.config.load import load_config, preset_names
from megatron_vila.config.schema import Config
from megatron_vila.errors import ConfigError, UserError, entry_point
from megatron_vila.explain.sample import parse_sample, require_sample
from megatron_vila.explain.text import count, size
from megatron_vila.plan.bounds import value_of

if TYPE_CHECKING:
    from megatron_vila.data.dataset import VilaDataset
    from megatron_vila.explain.view.page import Page
    from megatron_vila.explain.view.rows import Row

FIRST = 8
"""Samples that are shown unless the command line says which."""

PICTURES, TOKENS = 16, 4000
"""Pictures of each medium and tokens of text of each sample that are shown at most."""

LARGE_PAGE = 40 * 2**20
"""Bytes from which on a page opens slowly."""

SHAPING = (
    "model.name",
    "model.vision.image_size",
    "data.image_aspect",
    "data.num_frames",
    "data.fps",
    "data.fps_rule",
    "train.seq_length",
    "data.over_long",
    "data.packing",
    "data.media_format",
    "data.tokenizer",
    "data.template",
)
"""Settings that shape a sample: they stand at the top of a page."""

_OVERRIDE = re.compile(r"(include|[a-z_]+(\.[a-z0-9_]+)+)=")
_METADATASET = re.compile(r"^__(class|module)__\s*:", re.MULTILINE)

_TEXT = """Write a page that shows samples as the model will see them: docs/view_data.md.

python tools/view_data.py run.yaml --out page.html
python tools/view_data.py samples.json shards/ --tokenizer TOKENIZER --samples 0 5 --out page.html
python tools/view_data.py --config run.yaml samples.json data.num_frames=64 --out page.html
"""


@entry_point
def main(arguments: Sequence[str]) -> int:
    """Write the page that ``arguments`` ask for; returns the exit status (2: bad input)."""
    options = _parser().parse_intermixed_args(arguments)
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; name a file, e.g. {options.out / 'page.html'}")
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    # Imported late: --help needs no torch, and Megatron-Core must be prepared for this machine first.
    from megatron_vila import accelerator

    accelerator.prepare()
    from megatron_vila.explain.view.page import render
    from megatron_vila.plain_files import replace_file

    config = _config(options)
    page = _page(config, options)
    content = render(page).encode("utf-8", "backslashreplace")
    try:
        replace_file(options.out, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}; name another file") from error
    print(f"{options.out}: {_contents(page)}, {size(len(content))}")
    if len(content) > LARGE_PAGE:
        print("a page of this size opens slowly; show fewer samples, or fewer pictures of each with --pictures")
    return 0


def _contents(page: Page) -> str:
    bad = sum(bool(sample.kind) for sample in page.samples)
    pictures = sum(len(medium.squares) for sample in page.samples for medium in sample.media)
    unusable = f", {bad} of them cannot be used" if bad else ""
    rows = f", {count(len(page.rows), 'row')}" if page.rows else ""
    return f"{count(len(page.samples), 'sample')}{unusable}, {count(pictures, 'picture')}{rows}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=_TEXT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="CONFIG_OR_SET",
        help="a YAML file or preset of a run, or sets of samples as data.train takes them; and KEY=VALUE, settings that win",
    )
    parser.add_argument("--config", help="the run whose settings hold, where sets are named too")
    parser.add_argument("--out", type=Path, required=True, help="file to write, e.g. page.html")
    parser.add_argument(
        "--samples",
        nargs="+",
        action="extend",
        default=[],
        metavar="N",
        help="numbers of samples, e.g. 0 5; eval:3 is one of data.eval",
    )
    parser.add_argument(
        "--first",
        type=_whole,
        metavar="N",
        help=f"the first N samples of data.train ({FIRST} where nothing else is asked for)",
    )
    parser.add_argument(
        "--rows", type=_whole, default=0, metavar="N", help="show how the first N rows of the run are packed (none)"
    )
    parser.add_argument(
        "--pictures",
        type=_whole,
        default=PICTURES,
        metavar="N",
        help=f"most pictures of a medium, spread evenly over it ({PICTURES}); 0: none are decoded",
    )
    parser.add_argument(
        "--tokens",
        type=_whole,
        default=TOKENS,
        metavar="N",
        help=f"most tokens of text of a sample ({TOKENS}), from its start and its end",
    )
    parser.add_argument("--tokenizer", help="data.tokenizer")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _config(options: argparse.Namespace) -> Config:
    """The settings of a run, or the usual ones, for the sets that are named."""
    from megatron_vila.data.check import USUAL
    from megatron_vila.data.tokenizer import load_tokenizer
    from megatron_vila.start_checks import check_data

    overrides = [text for text in options.what if _is_override(text)]
    names = [text for text in options.what if text not in overrides]
    run = options.config
    if run is None and names and _is_run(names[0]):
        run, *names = names
    config = load_config(run or USUAL, overrides)
    if options.tokenizer is not None:
        config.data.tokenizer = options.tokenizer
    if names:
        config.data.train, config.data.eval = names, []
    if not config.data.train and not config.data.eval:
        raise ConfigError("command line: nothing to show; name a run with data.train, or a set of samples (--help)")
    # Bad records are shown, with what is wrong with them.
    config.data.bad_records = "skip"
    check_data(config)
    if not config.data.tokenizer:
        raise ConfigError(
            "data.tokenizer is empty; give --tokenizer, the folder of a Hugging Face tokenizer with a chat template"
        )
    if run is None:
        # Whose model it is was not said: that of the tokenizer.
        config.model.llm.vocab_size = 1 + max(load_tokenizer(config.data.tokenizer).get_vocab().values())
    return config


def _is_override(text: str) -> bool:
    return _OVERRIDE.match(text) is not None and not os.path.exists(text)


def _is_run(name: str) -> bool:
    """Whether ``name`` is a preset, or a YAML file that is no metadataset of Energon (which is a set of samples)."""
    if name in preset_names():
        return True
    if not name.endswith((".yaml", ".yml")):
        return False
    try:
        text = Path(name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # which says what is wrong with the file
    return _METADATASET.search(text) is None


def _page(config: Config, options: argparse.Namespace) -> Page:
    from megatron_vila.data.sources.holdings import holdings_warnings
    from megatron_vila.data.tokenizer import tokenizer_warnings
    from megatron_vila.explain.view.page import Page
    from megatron_vila.explain.view.pictures import Painter
    from megatron_vila.explain.view.samples import Limits, sample_of
    from megatron_vila.host_memory import cores_of_rank
    from megatron_vila.training.run_data import open_dataset

    asked = [parse_sample(text, f"--samples {text}", config) for text in options.samples]
    first = options.first if options.first is not None or asked else FIRST
    if not (asked or first or options.rows):
        raise ConfigError("command line: nothing to show; ask for samples (--samples, --first) or rows (--rows)")
    names = dict.fromkeys([*(name for name, _ in asked), *(["train"] if first or options.rows else [])])
    opened = {name: open_dataset(config, name) for name in names}
    for text, (name, index) in zip(options.samples, asked, strict=True):
        require_sample(opened[name], index, f"--samples {text}", name)
    if first:
        asked += [("train", index) for index in range(min(first, len(opened["train"])))]
    limits = Limits(options.pictures, options.tokens)
    with contextlib.ExitStack() as stack:
        painters = {name: stack.enter_context(Painter(config, opened[name], cores_of_rank())) for name in opened}
        chosen, samples = dict.fromkeys(asked), []
        on_sample = stack.enter_context(counted("samples", len(chosen))) if chosen else lambda: None
        for name, index in chosen:
            samples.append(sample_of(opened[name], painters[name], name, index, limits))
            on_sample()
    rows, note = _rows(config, opened["train"], options.rows) if options.rows else ((), "")
    warnings = [
        warning for dataset in opened.values() for warning in holdings_warnings(config, dataset.records.holdings)
    ]
    for dataset in list(opened.values())[:1]:
        warnings = [*tokenizer_warnings(config, dataset.encoder.tokenizer), *warnings]
    return Page(
        title=_title(config, opened),
        settings=_settings(config),
        warnings=warnings,
        samples=samples,
        side=config.model.vision.image_size,
        rows=rows,
        rows_note=note,
    )


def _rows(config: Config, dataset: VilaDataset, count: int) -> tuple[Sequence[Row], str]:
    """The first rows of the run and what is to be said of them."""
    from megatron_vila.data.dataset import NoUsableSampleError
    from megatron_vila.explain.view.rows import first_rows

    how = "samples are packed" if config.data.packing else "data.packing=false: one sample a row"
    note = (
        f"As a new run plans them: {how}, {config.train.global_batch_size} rows a step, padding for tp={config.parallel.tp}, "
        f"ulysses={config.parallel.ulysses}, ring={config.parallel.ring}. No pixel was read for this: a sample that cannot be "
        "decoded will be left out, and the rows close up."
    )
    try:
        return first_rows(config, dataset, count), note
    except NoUsableSampleError as error:
        return (), str(error)


def _title(config: Config, opened: Mapping[str, VilaDataset]) -> str:
    return " · ".join(
        f"data.{name}: {count(len(dataset), 'sample')} of {', '.join(getattr(config.data, name))}"
        for name, dataset in opened.items()
    )


def _settings(config: Config) -> list[tuple[str, str]]:
    """Names and values of the settings that shape a sample."""
    return [(name, str(value_of(config, name)) or "its own") for name in SHAPING]

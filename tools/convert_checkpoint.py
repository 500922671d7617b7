"""Checkpoints to and from Hugging Face: docs/checkpoints.md tells what is read and written.

python tools/convert_checkpoint.py import VILA_OR_HF_FOLDER OUT
python tools/convert_checkpoint.py export CHECKPOINT OUT
python tools/convert_checkpoint.py verify CHECKPOINT
python tools/convert_checkpoint.py verify A B
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.busy import CurrentStdout, busy
from megatron_vila.config.text_rules import TEMPLATES
from megatron_vila.errors import entry_point
from megatron_vila.plan.validate import CHOICES


@entry_point
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[CurrentStdout()])
    logging.getLogger("megatron_vila").setLevel(logging.INFO)
    with busy(options.doing):
        # Imported late: --help needs no torch.
        from megatron_vila import accelerator

        accelerator.prepare()
        return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="import, export or verify")

    command = commands.add_parser("import", help="Hugging Face folder to a run's folder")
    command.add_argument("source", type=Path, help="folder of a VILA (either layout), or of a plain language model")
    command.add_argument("out", type=Path, help="run's folder to write: config.yaml, tokenizer/ and checkpoints/")
    command.add_argument("--vision", type=Path, help="SigLIP folder beside a plain language model")
    command.add_argument(
        "--projector", help="type of the fresh projector beside a plain language model (mlp_downsample)"
    )
    command.add_argument(
        "--token-order",
        choices=CHOICES["model.projector.token_order"],
        help="order of mlp_downsample's tokens, if the model does not record it",
    )
    command.add_argument(
        "--template",
        choices=("own", *TEMPLATES),
        help="chat template: the tokenizer's own or a prompt of VILA's (default: as the time of the model suggests)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a converted model")
    command.set_defaults(run=_import, doing="importing")

    command = commands.add_parser("export", help="distributed checkpoint to a Hugging Face folder")
    command.add_argument("checkpoint", type=Path, help="folder of a run, of one of its steps, or of an import")
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument(
        "--layout", choices=("vila", "flat"), default="vila", help="folders of the VILA code, or one state dict"
    )
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="element type (default: as stored)")
    command.add_argument("--adapter", action="store_true", help="write the LoRA alone, as a PEFT adapter")
    command.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the run's data.tokenizer)")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it holds a converted model")
    command.set_defaults(run=_export, doing="exporting")

    command = commands.add_parser(
        "verify",
        help="check the files of one checkpoint, or compare two models bit by bit; exit status 1 if damaged or different",
    )
    command.add_argument("a", type=Path, help="distributed checkpoint; beside B also a Hugging Face folder")
    command.add_argument("b", type=Path, nargs="?", help="Hugging Face folder or distributed checkpoint to compare with")
    command.set_defaults(run=_verify, doing="verifying")
    return parser


def _import(options: argparse.Namespace) -> int:
    from megatron_vila.convert.importer import import_checkpoint

    out = import_checkpoint(
        options.source,
        options.out,
        vision=options.vision,
        projector=options.projector,
        token_order=options.token_order,
        overwrite=options.overwrite,
        template="" if options.template == "own" else options.template,
    )
    print(
        f"imported into {out}; train it with: python -m megatron_vila.train {out / 'config.yaml'} data.train=[samples.json]"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from megatron_vila.convert.exporter import export_checkpoint

    out = export_checkpoint(
        options.checkpoint,
        options.out,
        layout=options.layout,
        dtype=options.dtype,
        adapter=options.adapter,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
    )
    print(f"exported to {out}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from megatron_vila.convert.verify import verify, verify_files

    if options.b is None:
        files = verify_files(options.a)
        print(files)
        return 0 if files.whole else 1
    report = verify(options.a, options.b)
    print(report)
    return 0 if report.equal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Ask an exported model held-out questions through transformers; the last part of the quickstart.

python examples/quickstart/answer_held_out.py runs/quickstart/hf runs/quickstart/data/eval_32.json \
  --summary runs/quickstart/summary.json

Prints a table of questions, the truth and the model's answers, and notes in the summary under "transformers" the first of them
and how many were answered right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from megatron_vila.busy import busy, counted
from megatron_vila.data.placement import MARKER
from megatron_vila.data.records import Record
from megatron_vila.data.sources.json_files import JsonFiles
from megatron_vila.training.summary import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

SHOWN = 8
"""Rows of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("samples", help="LLaVA-format file with held-out questions")
    parser.add_argument("--summary", type=Path, help="summary.json to note the result in")
    parser.add_argument("--questions", type=int, default=16, help="how many of the questions are asked")
    parser.add_argument("--batch", type=int, default=4, help="questions that are answered at once")
    args = parser.parse_args()

    files = JsonFiles([args.samples])
    records = [files.record(number) for number in range(min(args.questions, len(files)))]
    expected = [record.turns[-1].text for record in records]
    with busy("loading torch, transformers and the model"):
        model, processor = load(args.model)
    answers: list[str] = []
    with counted("answers", len(records)) as answered:
        for start in range(0, len(records), args.batch):
            for answer in ask(model, processor, records[start : start + args.batch]):
                answers.append(answer)
                answered()
    questions = [MARKER.sub("", record.turns[-2].text).strip() for record in records]
    right = sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True))
    result = {"question": questions[0], "answer": answers[0], "expected": expected[0], "asked": len(records), "right": right}
    print_answers(questions, expected, answers, Console())
    print(f"{right} of {len(records)} held-out questions answered right through transformers")
    if args.summary:
        summary = json.loads(args.summary.read_text(encoding="utf-8"))
        write_json(args.summary, summary | {"transformers": result})


def load(folder: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    import megatron_vila.hf  # noqa: F401  registers the classes

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(folder).to(device), AutoProcessor.from_pretrained(folder)


def ask(model: PreTrainedModel, processor: ProcessorMixin, records: Sequence[Record]) -> list[str]:
    """The model's answer to the last question of each record."""
    chats = [[{"role": turn.role, "content": turn.text} for turn in record.turns[:-1]] for record in records]
    inputs = processor.apply_chat_template(
        chats,
        images=[[medium.path for medium in record.media if not medium.is_video] for record in records],
        videos=[[medium.path for medium in record.media if medium.is_video] for record in records],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def print_answers(questions: Sequence[str], expected: Sequence[str], answers: Sequence[str], console: Console) -> None:
    """The first ``SHOWN`` answers beside the truth."""
    table = Table("question", "truth", "answer", "", box=None, pad_edge=False)
    for question, wanted, answer in list(zip(questions, expected, answers, strict=True))[:SHOWN]:
        cells = (_short(question), _short(wanted), _short(answer), "right" if answer == wanted else "wrong")
        table.add_row(*map(escape, cells), style=None if answer == wanted else "red")
    console.print(table)


def _short(text: str) -> str:
    """One line that leaves room for the others."""
    line = " ".join(text.split())
    return line if len(line) <= 48 else line[:45] + "..."


if __name__ == "__main__":
    main()

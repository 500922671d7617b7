"""Ask an exported model held-out questions through transformers; the last part of the quickstart.

python examples/quickstart/answer_held_out.py runs/quickstart/hf runs/quickstart/data/eval_32.json \
  --summary runs/quickstart/summary.json

Prints a question, the model's answer and the expected one, and notes them in the summary under "transformers", with how many
of the questions were answered right.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils.logging import disable_progress_bar

import megatron_vila.hf  # noqa: F401  registers the classes
from megatron_vila.data.placement import MARKER
from megatron_vila.data.records import RecordFiles
from megatron_vila.training.summary import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("samples", help="LLaVA-format file with held-out questions")
    parser.add_argument("--summary", type=Path, help="summary.json to note the result in")
    parser.add_argument("--questions", type=int, default=16, help="how many of the questions are asked, in one batch")
    args = parser.parse_args()

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    processor = AutoProcessor.from_pretrained(args.model)
    records = list(RecordFiles([args.samples]))[: args.questions]
    chats = [[{"role": turn.role, "content": turn.text} for turn in record.turns[:-1]] for record in records]
    inputs = processor.apply_chat_template(
        chats,
        images=[[medium.path for medium in record.media if not medium.is_video] for record in records],
        videos=[[medium.path for medium in record.media if medium.is_video] for record in records],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    ).to(device)
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    expected = [record.turns[-1].text for record in records]
    result = {
        "question": MARKER.sub("", chats[0][-1]["content"]).strip(),
        "answer": answers[0],
        "expected": expected[0],
        "asked": len(records),
        "right": sum(answer == wanted for answer, wanted in zip(answers, expected, strict=True)),
    }
    print(f"question: {result['question']}\nanswer:   {result['answer']}\nexpected: {result['expected']}")
    print(f"{result['right']} of {result['asked']} held-out questions answered right through transformers")
    if args.summary:
        summary = json.loads(args.summary.read_text(encoding="utf-8"))
        write_json(args.summary, summary | {"transformers": result})


if __name__ == "__main__":
    main()

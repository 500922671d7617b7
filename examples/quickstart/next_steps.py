"""What the quickstart left, and what to do next: commands that work as they are printed; the last part of the quickstart.

python examples/quickstart/next_steps.py runs/quickstart --processes 2

Writes runs/my_data.json (unless it is there), a few of the quickstart's records to be replaced by your own.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
QUESTION = "Which colour flashed in the video?"  # in the words that the model was trained on
RECORDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the quickstart")
    parser.add_argument("--processes", type=int, default=2, help="processes that it trained with")
    parser.add_argument("--started-in", type=Path, default=Path.cwd(), help="folder that the commands will be typed in")
    args = parser.parse_args()
    own = args.run.parent / "my_data.json"
    if not own.exists():
        write_first_records(args.run / "data/train_32.json", own)
    print(f"sample: {args.run}/sample.png (a video's frames, its needle marked), loss: {args.run}/loss.png")
    print(f"checkpoint: {args.run}/stage_4, exported: {args.run}/hf")
    print(f"needle in a haystack: {args.run}/needle/needle.png, every answer: {args.run}/needle/needle.json")
    print(f"metrics: {args.run}/stage_4/metrics.jsonl, summary: {args.run}/summary.json")
    ask, train, export = (shlex.join(command) for command in commands(args.run, own, args.processes))
    if args.started_in.resolve() != REPO:
        print(f"\nFirst:\n  cd {shlex.quote(str(REPO))}")
    print(f"\nAsk it something:\n  {ask}")
    print(f"\nTrain on your own data: {own} holds {RECORDS} of the quickstart's records; put yours there (docs/data.md), then:")
    print(f"  {train}\nand export what came of it:\n  {export}")
    print("\nTo start from published weights: docs/checkpoints.md. Bigger machines: docs/launching.md.")


def commands(run: Path, own: Path, processes: int) -> tuple[list[str], list[str], list[str]]:
    """To ask the exported model, to train it on, and to export that."""
    python = os.path.relpath(sys.executable, REPO) if REPO in Path(sys.executable).parents else sys.executable
    out = run.parent / "my_run"
    ask = [python, "examples/generate.py", str(run / "hf"), QUESTION, "--video", str(run / "data/videos/eval_32_00000.mp4")]
    train = [python, "-m", "megatron_vila.launch", "--nproc-per-node", str(processes)]
    train += ["examples/quickstart/stage_4.yaml", f"parallel.ulysses={processes}"]
    train += [f"data.train=[{own}]", f"data.tokenizer={run / 'data/tokenizer'}", f"checkpoint.load={run / 'stage_4'}"]
    export = [python, "tools/convert_checkpoint.py", "export", str(out), str(out / "hf")]
    return ask, [*train, f"train.output={out}"], export


def write_first_records(source: Path, out: Path) -> None:
    """The first records of ``source``, with their media named from the folder of ``out``."""
    records = json.loads(source.read_text(encoding="utf-8"))[:RECORDS]
    for record in records:
        record["video"] = os.path.relpath(source.parent / record["video"], out.parent)
    out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

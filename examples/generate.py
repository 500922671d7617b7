"""Ask an exported VILA about pictures and videos, through transformers.

python examples/generate.py MODEL_FOLDER "What happens in the video?" --video clip.mp4 --frames 64
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from megatron_vila.busy import busy


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that tools/convert_checkpoint.py export wrote, of either layout")
    parser.add_argument("question")
    parser.add_argument("--image", action="append", default=[], help="picture to show; may be given several times")
    parser.add_argument("--video", action="append", default=[], help="video to show; may be given several times")
    parser.add_argument("--frames", type=int, help="frames of each video (default: as the model was trained)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    return parser


def main() -> None:
    args = parser().parse_args()
    if missing := [path for path in (args.model, *args.image, *args.video) if not Path(path).exists()]:
        parser().error(f"{', '.join(missing)}: no such file or folder")
    with busy("loading torch, transformers and the model") as shown:
        import torch
        from transformers import AutoModelForCausalLM, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        import megatron_vila.hf  # noqa: F401  registers the classes

        disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
        processor = AutoProcessor.from_pretrained(args.model)
        shown("answering")
        media = [{"type": "image", "path": path} for path in args.image] + [
            {"type": "video", "path": path} for path in args.video
        ]
        conversation = [{"role": "user", "content": [*media, {"type": "text", "text": args.question}]}]
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, num_frames=args.frames
        ).to(device)
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()

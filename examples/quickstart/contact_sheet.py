"""Draw a contact sheet of a synthetic video: its frames in order, the needle frame marked, question and answer written below.

python examples/quickstart/contact_sheet.py runs/quickstart/data/eval_32.json runs/quickstart/sample.png
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, MARGIN, COLUMNS = 112, 10, 24, 8
PAPER, INK, FAINT, MARK = "#ffffff", "#1f2933", "#616e7c", "#c2410c"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="LLaVA-format file that tools/make_synthetic_videos.py wrote")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("--sample", type=int, default=0, help="number of the record in the file, from 0")
    args = parser.parse_args()
    records = json.loads(args.samples.read_text(encoding="utf-8"))
    if not 0 <= args.sample < len(records):
        parser.error(f"--sample {args.sample}: {args.samples} holds records 0 to {len(records) - 1}")
    record = records[args.sample]
    if "video" not in record:
        parser.error(f"record {args.sample} of {args.samples} is not a video")
    path = args.samples.parent / record["video"]
    with av.open(str(path)) as video:
        frames = [frame.to_image() for frame in video.decode(video=0)]
    question, answer = (turn["value"].replace("<video>", "").strip() for turn in record["conversations"])
    draw_sheet(frames, record["needle_frame"], question, answer).save(args.out, optimize=True)
    print(f"{args.out}: the {len(frames)} frames of {path}, the answer stands in frame {record['needle_frame']}")


def draw_sheet(frames: Sequence[Image.Image], needle: int, question: str, answer: str) -> Image.Image:
    """The frames in rows of ``COLUMNS``, numbered from 0; frame ``needle`` has a frame of its own. Text below."""
    small, large = ImageFont.load_default(13), ImageFont.load_default(20)
    columns = min(COLUMNS, len(frames))
    rows = -(-len(frames) // columns)
    # Never narrower than its text.
    width = max(2 * MARGIN + columns * (CELL + GAP) - GAP, 2 * MARGIN + int(large.getlength(f"question  {question}")))
    cell_height = CELL + 20
    sheet = Image.new("RGB", (width, 2 * MARGIN + rows * (cell_height + GAP) + 68), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, frame in enumerate(frames):
        x = MARGIN + number % columns * (CELL + GAP)
        y = MARGIN + number // columns * (cell_height + GAP)
        # Small frames are shown as they are, pixel by pixel.
        sheet.paste(frame.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
        label, color = (f"{number} needle", MARK) if number == needle else (str(number), FAINT)
        if number == needle:
            pen.rectangle((x - 5, y - 5, x + CELL + 4, y + CELL + 4), outline=MARK, width=5)
        pen.text((x, y + CELL + 5), label, fill=color, font=small)
    y = sheet.height - MARGIN - 58
    for line, (name, text) in enumerate((("question", question), ("answer", answer))):
        pen.text((MARGIN, y + 30 * line), name, fill=FAINT, font=large)
        pen.text((MARGIN + large.getlength("question  "), y + 30 * line), text, fill=INK, font=large)
    # A palette makes the file small; this method keeps rare colors, and the needle's is one.
    return sheet.quantize(128, Image.Quantize.MAXCOVERAGE)


if __name__ == "__main__":
    main()

"""The explanation of a layout: its text says where ranks, layers, frames and tokens lie, and reads without a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vila.config.load import load_config
from megatron_vila.explain.__main__ import main
from megatron_vila.explain.sample import made_up_document
from megatron_vila.explain.text import number, ranges, rank_list, size
from megatron_vila.plan import traffic
from megatron_vila.plan.grid import GridShape
from megatron_vila.plan.row import pack
from megatron_vila.plan.row_plan import RowPlan

ROOT = Path(__file__).parents[1]


def explained(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def prose(text: str) -> str:
    """The text with its line breaks taken out."""
    return " ".join(text.split())


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def row_of(text: str, first_cell: str) -> list[str]:
    """Cells of the table row that begins with ``first_cell``."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first_cell + "  ")]
    return [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]


# ---------------------------------------------------------------------------------------------------------------- the text


def test_the_grid_of_256_ranks_is_explained_with_ranges_and_strides(capsys):
    text = explained(capsys, "longvila-7b-stage5", "world_size=256")
    assert "longvila-7b on 256 ranks (32 nodes of 8)" in text
    assert re.search(r"^dp +d +8 +32 ", text, re.MULTILINE)
    assert re.search(r"^ring +32 +8 +0, 4 \.\. 28 \(every 4th\) +crosses nodes ", text, re.MULTILINE)
    assert "cp = ulysses * ring = 16; a row is spread over tp * cp = 32 ranks" in text
    assert "One step: 32 rows = 8 data-parallel replicas x 4 micro-batches of one row." in text


def test_groups_that_cross_nodes_are_told_from_those_that_do_not(capsys):
    text = explained(capsys, "longvila-7b-stage5", "world_size=64")
    links = {line.split()[0]: line for line in text.splitlines() if re.match(r"(tp|ulysses|ring|cp) .*node", line)}
    assert "inside a node" in links["tp"]
    assert "inside a node" in links["ulysses"]
    assert "crosses nodes" in links["ring"]
    assert "crosses nodes" in links["cp"]


def test_the_size_of_a_node_decides_what_crosses(capsys):
    text = explained(capsys, "longvila-7b-stage5", "world_size=64", "parallel.gpus_per_node=64")
    assert "crosses nodes" not in text
    assert "on 64 ranks (one node)" in text


def test_every_rank_stands_in_one_group_of_each_kind(capsys):
    text = explained(capsys, "tiny", "world_size=8", "parallel.tp=2", "parallel.pp=2", "parallel.ring=2")
    groups = text[text.index("Groups") : text.index("One step")]
    counts = {m[1]: int(m[2]) * int(m[3]) for m in re.finditer(r"^(\w+) +(\d+) +(\d+)  ", groups, re.MULTILINE)}
    assert counts == dict.fromkeys(["tp", "ulysses", "ring", "cp", "tp_cp", "dp", "dp_cp", "pp", "block"], 8)


def test_layers_are_dealt_to_pipeline_stages_with_what_else_they_hold(capsys):
    text = explained(capsys, "llama3-longvila-8b-stage5", "world_size=64", "parallel.pp=4")
    stages = text[text.index("Pipeline stages") : text.index("Attention heads")].splitlines()[3:7]
    cells = [re.split(r"\s{2,}", line.strip()) for line in stages]
    assert cells == [
        ["0", "0-15", "0-7", "vision tower, projector, token embedding"],
        ["1", "16-31", "8-15"],
        ["2", "32-47", "16-23"],
        ["3", "48-63", "24-31", "final norm, output layer and loss"],
    ]


def test_replicated_key_value_heads_are_named(capsys):
    text = explained(capsys, "longvila-7b-stage5", "parallel.tp=1", "parallel.ulysses=7", "parallel.ring=2")
    assert "Ulysses replicates: 4 key/value heads become 10 in a group, gradients are summed" in prose(text)
    text = explained(capsys, "llama3-longvila-8b-stage5", "parallel.tp=16", "parallel.ulysses=2")
    assert "each key/value head stands on 2 tp ranks" in prose(text)


def test_unreplicated_key_value_heads_are_named(capsys):
    assert "none is replicated" in prose(explained(capsys, "longvila-7b-stage5"))


def test_tokens_of_a_rank_are_those_of_the_padded_row(capsys):
    text = explained(
        capsys,
        "tiny",
        "world_size=8",
        "parallel.tp=2",
        "parallel.ulysses=2",
        "parallel.ring=2",
        "train.seq_length=1001",
    )
    assert row_of(text, "padded row")[1] == "1 008"
    assert row_of(text, "cp rank")[1] == "252"
    assert re.search(r"^rank +126 ", text, re.MULTILINE)


def test_frames_and_tokens_of_a_made_up_sample_are_placed(capsys):
    text = explained(capsys, "tiny", "world_size=2", "parallel.ulysses=2", "frames=5", "text=12")
    assert "Sample made up: 5 frames, 12 text tokens: 32 tokens (20 visual of 5 frames), 32 with padding" in prose(text)
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.match(r" *[01]   0/[01]/0 ", line)]
    assert lines[0][:5] == ["0", "0/0/0", "0-1", "2", "8"]
    assert lines[1][:5] == ["1", "0/1/0", "2-4", "3", "12"]
    assert lines[0][-1] == "0-7, 24-31"
    assert lines[1][-1] == "8-23"


def test_tensor_parallel_ranks_hold_slices_of_their_cp_rank(capsys):
    text = explained(capsys, "tiny", "world_size=4", "parallel.tp=2", "parallel.ring=2", "text=32")
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.match(r" *\d   [01]/0/[01] ", line)]
    assert [line[-1] for line in lines] == ["0-7", "24-31", "8-15", "16-23"]


def test_a_rank_without_frames_shows_a_dash(capsys):
    text = explained(capsys, "tiny", "world_size=4", "parallel.ring=4", "frames=1", "text=12")
    assert sum(bool(re.match(r" *\d   0/0/\d +- +0 ", line)) for line in text.splitlines()) == 3


def test_a_sample_without_pictures_is_explained(capsys):
    text = explained(capsys, "tiny", "world_size=2", "parallel.ring=2", "text=100")
    assert "Stage 2 moves 0 of 0 visual tokens" in text


def test_a_made_up_sample_that_is_too_long_is_shown_whole_with_what_training_would_do(capsys):
    text = explained(capsys, "tiny", "frames=400")
    assert "longer than train.seq_length=1024: training would truncate it; shown whole" in prose(text)


def test_traffic_of_the_plan_is_in_the_table(capsys):
    config = load_config("longvila-7b-stage5", [])
    grid = GridShape.of(32, 2, 1, 2, 8)
    row = pack([made_up_document(config, 600, 2000)], grid.document_multiple, grid.row_multiple)
    sent, _ = traffic.reshard_bytes(RowPlan.of(row, grid).reshard, 3584, 2)
    links = traffic.Links.of(sent, np.arange(32) // 8)
    text = explained(capsys, "longvila-7b-stage5", "frames=600", "text=2000")
    (line,) = [line for line in text.splitlines() if line.startswith("stage-2 re-shard")]
    for amount in (links.most_sent_by_a_rank, links.inside_nodes, links.between_nodes):
        assert size(amount) in line


def test_recompute_and_pipeline_traffic_are_mentioned(capsys):
    text = explained(capsys, "longvila-7b-stage5", "parallel.pp=2", "world_size=64", "frames=10")
    assert "Between pipeline stages each rank sends" in text
    assert "memory.recompute=attention_output sends a layer's q, k, v and output" in text
    text = explained(capsys, "longvila-7b-stage5", "memory.recompute=full", "world_size=64", "frames=10")
    assert "memory.recompute=full runs the forward exchanges of each layer once more" in text


def test_many_ranks_are_listed_in_short_unless_all_are_asked_for(capsys):
    arguments = ["longvila-7b-stage5", "world_size=64", "parallel.ring=16", "frames=100"]

    def listed(text):
        return [int(m[1]) for m in re.finditer(r"^ *(\d+)   [01]/[01]/\d+ ", text, re.MULTILINE)]

    text = explained(capsys, *arguments)
    assert listed(text) == [*range(8), *range(56, 64)]
    assert "48 ranks not listed (--all-ranks lists them)" in prose(text)
    text = explained(capsys, *arguments, "--all-ranks")
    assert listed(text) == [*range(64)] and "not listed" not in text


def test_the_planned_gpu_decides_what_is_said_of_memory(capsys):
    arguments = ["models/qwen2-7b", "train.seq_length=8192", "parallel.tp=2", "world_size=2"]
    text = prose(explained(capsys, *arguments, "--gpu", "h100"))
    assert "on an H100 with 79.1 GiB (planned for; --gpu names another): weights " in text
    assert "warning: a rank needs about" in text and "but an H100 has 79.1 GiB" in text
    assert "warning: a rank needs" not in prose(explained(capsys, *arguments, "--gpu=b200"))


def test_a_terminal_of_80_columns_is_filled_and_not_exceeded(tmp_path):
    """In a real pseudo-terminal; as wide as the terminal up to 110 columns."""
    arguments = ["longvila-7b-stage5", "world_size=256", "frames=600", "text=2000"]
    for columns, most in ((80, 80), (60, 80), (95, 95), (200, 110)):
        widths = [len(line.rstrip()) for line in on_a_terminal(columns, arguments)]
        assert most - 12 < max(widths) <= most, columns


def on_a_terminal(columns, arguments):
    """Lines that the command writes to a terminal so wide, styles taken out."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.pop("COLUMNS", None)
        termios.tcsetwinsize(1, (24, columns))
        sys.stdout = open(1, "w", encoding="utf-8")  # noqa: SIM115 (pytest holds the other one)
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    written = b""
    while True:
        try:
            written += os.read(terminal, 65536)
        except OSError:
            break
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).splitlines()


def test_warnings_stand_at_the_end(capsys):
    text = explained(capsys, "tiny", "train.seq_length=16384")
    assert text[text.index("rank     ") :].count("warning: train.seq_length=16384 exceeds") == 1


def test_piped_output_has_no_colors_and_fits_110_columns():
    command = [
        sys.executable,
        "-m",
        "megatron_vila.explain",
        "longvila-7b-stage5",
        "world_size=256",
        "frames=600",
        "text=2000",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "\x1b" not in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 110
    assert run.stderr == ""


# ------------------------------------------------------------------------------------------------- samples of the training data


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Overrides with a broken video, three pictures in one sample and a text sample."""
    from PIL import Image

    from tests.data.material import byte_level_tokenizer

    byte_level_tokenizer("qwen2").save_pretrained(tmp_path / "tokenizer")
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    answer = {"from": "gpt", "value": "A red circle."}
    records = [
        {"id": "broken", "video": "missing.mp4", "conversations": [{"from": "human", "value": "<video>What?"}, answer]},
        {
            "id": "pictures[/b]",
            "images": ["a.png", "b.png", "c.png"],
            "conversations": [{"from": "human", "value": "<image><image><image>What?"}, answer],
        },
        {"id": "text", "conversations": [{"from": "human", "value": "What?"}, answer]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    return [f"data.train=[{tmp_path / 'train.json'}]", f"data.tokenizer={tmp_path / 'tokenizer'}"]


def test_a_sample_of_the_training_data_is_placed(capsys, data, tmp_path):
    text = explained(capsys, "tiny", "world_size=2", "parallel.ring=2", "sample=1", *data)
    assert "Sample pictures[/b]: " in text
    assert "(12 visual of 3 frames)" in prose(text)
    assert "b.png" in text.replace("\n", "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.match(r" *[01]   0/0/[01] ", line)]
    assert [line[2:5] for line in lines] == [["0", "1", "4"], ["1-2", "2", "8"]]


def test_in_the_place_of_a_broken_sample_the_next_good_one_is_explained(capsys, data):
    text = prose(explained(capsys, "tiny", "sample=0", *data))
    assert "Sample pictures[/b]: " in text
    assert "sample 0 cannot be used (missing) and is left out; shown is sample 1: " in text
    assert "missing.mp4" in text.replace(" ", "")


def test_a_sample_that_is_not_there_is_refused_with_those_that_are(capsys, data):
    assert "sample=3 is not in data.train, which has samples 0 to 2" in refused(capsys, "tiny", "sample=3", *data)


def test_a_sample_of_a_missing_file_is_refused(capsys, data):
    assert "nowhere.json" in refused(capsys, "tiny", "sample=0", *data, "data.train=[nowhere.json]")


def test_a_sample_without_a_tokenizer_is_refused(capsys, data):
    assert "data.tokenizer is empty" in refused(capsys, "tiny", "sample=0", *data, "data.tokenizer=")


def test_a_row_on_4096_ranks_is_explained_where_there_is_no_torch():
    """A lookup that is quadratic in Python would take minutes here."""
    settings = "longvila-7b-stage5 world_size=4096 parallel.ring=1024 frames=4096 train.seq_length=2097152 --gpu gb200"
    program = (
        "import sys; sys.modules['torch'] = None; from megatron_vila.explain.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *settings.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "longvila-7b on 4096 ranks (512 nodes of 8)" in done.stdout and "4080 ranks not listed" in done.stdout


# ------------------------------------------------------------------------------------------------------------- bad input


def test_help_is_given_without_arguments(capsys):
    for arguments in ([], ["--gpu", "h200"], ["--all-ranks"]):
        assert main(arguments) == 2
    assert main(["--help"]) == main(["tiny", "--help"]) == 0
    assert "world_size=256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["tiny", "world_size=3", "parallel.tp=2"], "world size 3 is not a multiple"),
        (["tiny", "world_size=many"], "world_size=many must be a whole number from 1 to"),
        (["tiny", "world_size=0"], "world_size=0 must be a whole number from 1 to"),
        (["tiny", "frames=-1"], "frames=-1 must be a whole number from 0 to 1000000"),
        (["tiny", "frames=1000000000"], "frames=1000000000 must be a whole number from 0 to 1000000"),
        (["tiny", "text=" + "9" * 5000], "must be a whole number from 0 to"),
        (["tiny", "sample=0", "frames=3"], "give one only"),
        (["tiny", "frames=0", "text=0"], "give at least one token"),
        (["tiny", "parallel.ulyses=2"], "unknown key 'parallel.ulyses'"),
        (["tiny", "sample=0"], "no file with samples was given"),
        (["tiny", "--gpu", "h900"], "--gpu h900 is not a GPU that is known here"),
        (["tiny", "world_size=1099511627776"], "world size 1099511627776 must be a mistake"),
    ],
)
def test_bad_input_gives_a_message_and_no_table(capsys, arguments, part):
    assert part in refused(capsys, *arguments)


# ----------------------------------------------------------------------------------------------------------- short texts


@given(st.sets(st.integers(0, 300)))
def test_ranges_hold_exactly_their_values(values):
    text = ranges(sorted(values))
    found = set()
    for piece in [] if text == "-" else text.split(", "):
        first, _, last = piece.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == values


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([5], "5"),
        (range(8), "0-7"),
        ([0, 2, 4, 6], "0, 2, 4, 6"),
        (range(0, 64, 4), "0, 4 .. 60 (every 4th)"),
        (range(1, 64, 2), "1, 3 .. 63 (every 2nd)"),
        ([*range(16), *range(128, 144)], "0-15, 128-143"),
        ([r for b in range(0, 256, 32) for r in range(b, b + 4)], "0-3, 32-35, 64-67 .. 227 (32 ranks)"),
    ],
)
def test_rank_lists_are_short(ranks, text):
    assert rank_list(ranks) == text


def test_numbers_and_sizes_are_readable():
    assert number(524288) == "524 288"
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]

"""``tools/view_data.py``: which samples it shows, what stands on its page, and what it says of a wrong command line."""

import base64
import io
import re

import pytest
from PIL import Image

from megatron_vila.config.load import load_config
from megatron_vila.data.cards import Alone, CardMaker
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.sources.open import open_blend
from megatron_vila.data.stream import StreamState
from megatron_vila.explain.view.command import main
from megatron_vila.training.feed import open_stream
from megatron_vila.training.run_data import open_dataset
from tests.data.material import byte_level_tokenizer, conversation, write_jsonl
from tests.view.material import (
    ARABIC,
    DESTROYED,
    GONE,
    HOSTILE,
    LONG,
    MIXED,
    PLAIN,
    RECORD,
    SETTINGS,
    SILENT,
    TWICE,
    settings,
    show,
)


@pytest.fixture(scope="module")
def page(shown_set, tmp_path_factory):
    """The page of the whole set, and its articles by their anchors."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert show(shown_set, out) == 0
    text = out.read_text()
    return text, dict(re.findall(r'<article id="([^"]+)"(.*?)</article>', text, re.DOTALL))


def test_a_sample_is_shown_with_its_place_numbers_and_pictures(page, shown_set):
    article = page[1][f"train-{PLAIN}"]
    assert "plain" in article and f"{shown_set / 'samples.jsonl'}, line 1" in article
    assert article.count("<img ") == 8 and article.count("data:image/webp;base64,") == 8
    # frames 0 to 31 at 8 a second, spread evenly
    assert "frame 0 · 0.00 s" in article and "frame 31 · 3.88 s" in article
    assert (
        "64 × 64 pixels, 32 frames, 4.0 s" in article
        and "8 frames chosen (data.num_frames=8, spread evenly)" in article
    )
    assert "<dt>frames and pictures</dt><dd>8</dd>" in article


@pytest.mark.parametrize(
    "place, kind, reason",
    [
        (GONE, "missing", "gone.mp4: no such file"),
        (RECORD, "bad record", "conversations"),
        (LONG, "too long", "text and images alone have [0-9]+ tokens"),
        (DESTROYED, "broken", "bad.mp4: .*decod"),
    ],
)
def test_a_sample_that_cannot_be_used_is_shown_with_the_reason(page, place, kind, reason):
    article = page[1][f"train-{place}"]
    assert f"cannot be used: {kind}</span>" in article
    assert re.search(reason, re.search('<p class="reason">(.*?)</p>', article, re.DOTALL)[1])


def test_a_sample_without_an_answer_is_told(page):
    assert "no answer to learn: it trains nothing" in page[1][f"train-{SILENT}"]
    assert "learns nothing</span>" in page[1][f"train-{SILENT}"]


def test_two_clips_of_one_file_are_two_videos(page, shown_set, tmp_path):
    article = page[1][f"train-{TWICE}"]
    assert article.count('<section class="medium"') == 2
    assert "clip from 0 s to 1 s" in article and "clip from 2 s to 3 s" in article
    # without text between them too
    assert (
        show(shown_set, tmp_path / "page.html", "data.media_format=vila", "--samples", str(TWICE), "--pictures", "1")
        == 0
    )
    assert (tmp_path / "page.html").read_text().count('<section class="medium"') == 2


def test_html_in_a_text_stays_text(page):
    text, articles = page
    assert HOSTILE not in text and "<script>window" not in text and "<img src=x" not in text
    assert "&lt;/script&gt;&lt;script&gt;window.broken = 1" in articles[f"train-{MIXED}"]
    assert all(letter in articles[f"train-{MIXED}"] for letter in ARABIC)
    assert "[U+202E]" in text and "\u202e" not in text


def test_the_page_asks_for_nothing_from_elsewhere(page):
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page[0])
    assert "default-src 'none'" in page[0]


def test_frames_that_do_not_fit_are_told_with_the_numbers(shown_set, tmp_path, capsys):
    assert show(shown_set, tmp_path / "page.html", "train.seq_length=60", "--samples", "0") == 0
    text = (tmp_path / "page.html").read_text()
    kept = int(re.search("thinned from 8 to ([0-9]+) to fit train.seq_length=60", text)[1])
    assert 1 <= kept < 8 and text.count("data:image/webp") == kept
    assert f"{8 - kept} frames left out, evenly, to fit train.seq_length=60" in text


def test_fewer_pictures_are_spread_over_the_video_and_none_are_decoded_where_none_are_shown(shown_set, tmp_path):
    out = tmp_path / "page.html"
    assert show(shown_set, out, "--samples", "0", "--pictures", "3") == 0
    assert (
        "3 of 8 pictures shown" in out.read_text()
        and "frame 0 ·" in out.read_text()
        and "frame 31 ·" in out.read_text()
    )
    assert show(shown_set, out, "--samples", str(DESTROYED), "--pictures", "0") == 0
    assert "<figure>" not in out.read_text() and "cannot be used" not in out.read_text()


def test_samples_of_both_sets_are_chosen_by_number(shown_set, tmp_path, capsys):
    out = tmp_path / "page.html"
    held_out = f"data.eval=[{shown_set / 'eval.jsonl'}]"
    assert show(shown_set, out, held_out, "--samples", "5", "--samples", "eval:0", "--first", "1", "--pictures", "1") == 0
    assert re.findall('<article id="([^"]+)"', out.read_text()) == ["train-5", "eval-0", "train-0"]
    assert "3 samples, 2 pictures" in capsys.readouterr().out


def test_a_set_alone_is_shown_with_the_usual_settings(shown_set, tmp_path, capsys):
    arguments = [str(shown_set / "eval.jsonl"), "--tokenizer", str(shown_set / "tokenizer"), "--pictures", "1"]
    assert main([*arguments, "--out", str(tmp_path / "page.html")]) == 0
    assert 'width="384"' in (tmp_path / "page.html").read_text()
    assert (
        main([*arguments, "--config", "tiny", "model.llm.vocab_size=1000", "--out", str(tmp_path / "page.html")]) == 0
    )
    assert 'width="384"' not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--samples", "8"], "--samples 8 is not in data.train, which has samples 0 to 7"),
        (["--samples", "eval:0"], "--samples eval:0, but data.eval is empty"),
        (["--samples", "x"], "--samples x must be the number of a sample"),
        (["data.num_frame=3"], "data.num_frames"),
        (["data.train=[gone.jsonl]"], "gone.jsonl"),
        (["model.llm.vocab_size=10"], "vocab_size"),
    ],
)
def test_a_wrong_command_line_is_told_and_leaves_no_page(shown_set, tmp_path, capsys, arguments, told):
    assert show(shown_set, tmp_path / "page.html", *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_page_without_anything_is_refused(shown_set, tmp_path, capsys):
    assert show(shown_set, tmp_path / "page.html", "--first", "0") == 2
    assert "nothing to show" in capsys.readouterr().err
    assert main([str(shown_set / "samples.jsonl"), "--out", str(tmp_path / "page.html")]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert show(shown_set, tmp_path, "--first", "1") == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_a_run_without_a_set_and_a_page_that_cannot_be_written_are_told(shown_set, tmp_path, capsys):
    assert main([*SETTINGS, "--out", str(tmp_path / "page.html")]) == 2
    assert "nothing to show" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*settings(shown_set), "--samples", "0", "--out", str(tmp_path / "file/page.html")]) == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*settings(shown_set), "--first", "-1", "--out", str(tmp_path / "page.html")])
    assert "whole number" in capsys.readouterr().err


def test_the_first_rows_are_those_that_a_run_trains_on(shown_set, tmp_path):
    out = tmp_path / "page.html"
    packed = [
        *(["data.packing=true", "train.seq_length=200", "parallel.ulysses=2", "data.shuffle=false"]),
        "train.global_batch_size=2",
    ]
    assert show(shown_set, out, *packed, "--samples", str(PLAIN), "--rows", "3", "--pictures", "0") == 0
    (rows,) = re.findall('<section class="rows".*?</section>', out.read_text(), re.DOTALL)
    assert re.findall("<h3>(.*?)</h3>", rows) == ["step 0, row 0", "step 0, row 1", "step 1, row 0"]
    config = load_config("tiny", settings(shown_set, *packed)[1:])
    dataset = open_dataset(config, "train")
    stream = open_stream(config, dataset, open_blend(config.data, config.data.train))
    cards = CardMaker(dataset, stream.cards, Alone(), 1)
    cards.share(stream.order.records(0, 40))
    cards.close()
    steps = [stream.plan(StreamState())]
    steps.append(stream.plan(steps[0].after))
    expected = [list(row) for step in steps for row in step.rows][:3]
    bars = re.findall('<div class="bar".*?</div>', rows, re.DOTALL)
    assert [[int(index) for index in re.findall("train ([0-9]+), ", bar)] for bar in bars] == expected
    assert max(map(len, expected)) > 1 and not {GONE, RECORD, LONG} & {index for row in expected for index in row}
    # each document is padded to a multiple of 4 (2 * ulysses)
    for tokens, padding in re.findall(r"<td>([0-9]+)</td><td>[0-9]+</td><td>[0-9]+</td><td>([0-9]+)</td></tr>", rows):
        assert (int(tokens) + int(padding)) % 4 == 0 and int(padding) < 4
    assert f'href="#train-{PLAIN}"' in rows and f'href="#train-{SILENT}"' not in rows


def test_a_set_without_a_usable_sample_is_shown_and_its_rows_are_told_to_be_none(shown_set, tmp_path):
    out = tmp_path / "page.html"
    assert show(shown_set, out, "train.seq_length=5", "--first", "1", "--rows", "1") == 0
    assert "none of the 8 samples can be used" in out.read_text() and "cannot be used: too long" in out.read_text()


def test_media_that_stand_in_the_record_itself_are_shown(tmp_path):
    with io.BytesIO() as file:
        Image.new("RGB", (24, 16), (255, 0, 0)).save(file, "PNG")
        inside = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    byte_level_tokenizer("qwen2").save_pretrained(tmp_path / "tokenizer")
    records = [
        {"image": inside, "conversations": conversation("<image> What?", "Red.")},
        {"video": [inside, inside], "conversations": conversation("<video> What?", "Red.")},
        {"image": "data:image/png;base64,AAAA", "conversations": conversation("<image> What?", "Red.")},
    ]
    write_jsonl(tmp_path / "samples.jsonl", records)
    assert show(tmp_path, tmp_path / "page.html") == 0
    picture, video, broken = re.findall("<article id=(.*?)</article>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert "bytes in memory" in picture and "picture of 24 × 16 pixels" in picture and picture.count("<img ") == 1
    assert "2 pictures without a rate" in video and video.count("<img ") == 2
    assert "cannot be used: broken" in broken and "3 bytes in memory: " in broken


def test_a_text_that_does_not_fit_is_read_once(shown_set, tmp_path, monkeypatch):
    read, encode = [], ChatEncoder.encode
    monkeypatch.setattr(ChatEncoder, "encode", lambda self, turns: read.append(turns) or encode(self, turns))
    assert show(shown_set, tmp_path / "page.html", "--samples", str(LONG)) == 0
    assert len(read) == 1 and "cannot be used: too long" in (tmp_path / "page.html").read_text()

"""The trained tokenizer is the same in SentencePiece and in transformers; loading says what is missing."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.template import ChatTemplateError
from megatron_vila.data.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer
from megatron_vila.errors import SettingError
from tests.data.material import byte_level_tokenizer

TEXTS = [
    "Which colour flashed in the video?",
    "What was the colour of the flash?\nIt was not red, it was blue.",
    "The user asks, the assistant answers: red, green, blue.",
    "user\nassistant\nsystem",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, out, 400)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_folder_loads_offline_as_a_fast_tokenizer_with_the_size_of_the_model(tokenizer, model):
    assert tokenizer.is_fast
    assert len(tokenizer) == model.get_piece_size() <= 400
    assert tokenizer.convert_ids_to_tokens(list(range(4))) == ["<unk>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 3)


@pytest.mark.parametrize(
    "text",
    [
        *TEXTS, "", " ", "\n", "a  b", "  lead", "trail  ", "a\n\n b", "Ünïcödé ☃ 日本語", "tab\tx",
        "a<0x41> <0x0A><<0xC3>>é", "<unused_399>",
    ],  # fmt: skip
)
def test_ids_equal_those_of_sentencepiece_and_text_survives(tokenizer, model, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == model.encode(text)
    assert tokenizer.decode(ids) == text


def test_a_filled_vocabulary_fits_a_larger_model_and_gives_the_same_ids(tokenizer, tmp_path):
    filled = train_tokenizer(TEXTS, tmp_path, 3000, fill=True)
    assert len(filled) == len(load_tokenizer(tmp_path)) == 3000
    assert not check_tokenizer(filled, 3000, {})
    for text in (*TEXTS, "<0x41>", "<unused_2999>"):
        assert filled.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_characters="▁\x00\r", exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives(tokenizer, model, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == model.encode(text)
    assert tokenizer.decode(ids) == text


def test_words_that_come_in_several_forms_become_one_piece(tmp_path):
    tokenizer = train_tokenizer(
        [f"A {word}, the {word}.\n{word}" for word in ("colour", "video", "flash")], tmp_path, 400
    )
    assert tokenizer.tokenize("video\nflash, colour") == ["video", "\n", "flash", ",", "▁colour"]


def test_offsets_point_into_the_text(tokenizer):
    text = "Which colour?\nred ☃<|im_end|>\n"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert pieces[-2:] == ["<|im_end|>", "\n"]
    covered = {place for a, b in encoded["offset_mapping"] for place in range(a, b)}
    assert covered == set(range(len(text)))


def test_conversations_are_written_as_chatml_with_single_special_tokens(tokenizer):
    messages = [{"role": "user", "content": "Which?\nSay."}, {"role": "assistant", "content": "red"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nWhich?\nSay.<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhich?\nSay.<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(2) == ids.count(3) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nWhich?\nSay.\nassistant\nred\n"


def test_the_same_texts_give_the_same_files(folder, tmp_path):
    train_tokenizer(TEXTS, tmp_path, 400)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_vocabulary_grows_no_further_than_the_texts(tmp_path):
    assert len(train_tokenizer(TEXTS, tmp_path, 5000)) < 500


def test_too_little_text_or_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="texts are empty"):
        train_tokenizer(["", "\n"], tmp_path, 400)
    with pytest.raises(ValueError, match=r"vocab_size=100 is too small .* use \d+ or more"):
        train_tokenizer(TEXTS, tmp_path, 100)


def test_the_least_vocabulary_that_the_message_names_works(tmp_path):
    with pytest.raises(ValueError) as caught:
        train_tokenizer(TEXTS, tmp_path, 1)
    least = int(str(caught.value).split("use ")[1].split()[0])
    assert len(train_tokenizer(TEXTS, tmp_path, least)) == least


def test_loading_says_what_is_missing(folder, tmp_path):
    with pytest.raises(SettingError, match="not a folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(SettingError, match="has no tokenizer_config.json; name the folder of a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ChatTemplateError, match="has no chat template; put a chat_template.jinja into its folder"):
        ChatEncoder(load_tokenizer(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_the_models_is_refused(tokenizer):
    size = len(tokenizer)
    other = "it is that of another model"
    for rows, reason in ((size - 1, "1 tokens beyond"), (2 * size + 1025, other), (152064, other)):
        with pytest.raises(ValueError, match=f"{reason}.*use the tokenizer that belongs to the model"):
            check_tokenizer(tokenizer, rows, {})
    with pytest.raises(ValueError, match=rf"data.frame_separator_ids holds id {size}, which is not a token of data.tokenizer="):
        check_tokenizer(tokenizer, 512, {"data.frame_separator_ids": [size]})


def test_padding_and_media_tokens_beyond_the_table_are_no_reason(tokenizer):
    newline = tokenizer.convert_tokens_to_ids("\n")
    for rows in (len(tokenizer), 512, len(tokenizer) + 1024):
        assert check_tokenizer(tokenizer, rows, {"data.frame_separator_ids": [newline, newline]}) == []
    vila = byte_level_tokenizer("qwen2")
    vila.add_tokens(["<vila/sentinel>", "<image>", "<vila/video>"])
    assert check_tokenizer(vila, 400, {}) == []


def test_what_may_be_wrong_with_a_tokenizer_is_told(tokenizer):
    size = len(tokenizer)
    (line,) = check_tokenizer(tokenizer, size + 1025, {})
    assert f"uses {size} of the model's {size + 1025} embeddings" in line
    word = tokenizer.convert_tokens_to_ids("colour") or size - 1
    (line,) = check_tokenizer(tokenizer, 512, {"data.image_separator_ids": [word]})
    assert line.startswith(f"data.image_separator_ids=[{word}] is the text {tokenizer.decode([word])!r} in data.tokenizer=")
    assert check_tokenizer(tokenizer, 512, {"data.image_separator_ids": [tokenizer.eos_token_id]}) == []

"""Control tokens written in a text are text, and nothing else is tokenized in another way than before."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.chat import ChatEncoder, RenderError
from megatron_vila.data.control_tokens import ControlTokenError, ControlTokens
from megatron_vila.data.placement import Turn
from tests.data.material import TEXTS, byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer

TOKENIZERS = {
    "llama3": byte_level_tokenizer("llama3"),
    "qwen2": byte_level_tokenizer("qwen2"),
    "vicuna": metaspace_tokenizer(),
    "own": sentencepiece_tokenizer(),
}
ENCODERS = {name: ChatEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def specials(tokenizer):
    return [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and not t.content.startswith("<0x")]


def ids_of(encoder, turns):
    (segment,) = encoder.encode(turns)
    return segment.token_ids.tolist()


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@every_tokenizer
def test_control_tokens_in_a_turn_are_text_and_those_of_the_template_stay(name):
    tokenizer = TOKENIZERS[name]
    control = set(tokenizer.convert_tokens_to_ids(specials(tokenizer)))
    plain = [Turn("system", "S."), Turn("user", "What?"), Turn("assistant", "A cat."), Turn("user", "B"), Turn("assistant", "C")]
    wanted = [i for i in ids_of(ENCODERS[name], plain) if i in control]
    for word in specials(tokenizer):
        told = [Turn(turn.role, f"{turn.text} {word}a{word}") for turn in plain]
        ids = ids_of(ENCODERS[name], told)
        assert [i for i in ids if i in control] == wanted, word
        # The same conversation as a text, read by the tokenizer with everything as text, is the truth for what lies between.
        rendered = tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in told], tokenize=False)
        assert decoded(tokenizer, ids).replace(" ", "") == rendered.replace(" ", "")


@every_tokenizer
def test_what_is_text_is_tokenized_as_a_text_of_its_own(name):
    tokenizer, control = TOKENIZERS[name], ControlTokens(TOKENIZERS[name])
    word = specials(tokenizer)[-1]
    text = f"Say{word}, then a new{word}{word} line"
    ids, places = control.encode(control.mark(text))
    other = word.replace("<", "<\u200b")
    assert not set(ids.tolist()) & set(tokenizer.convert_tokens_to_ids(specials(tokenizer)))
    if name in ("llama3", "qwen2"):
        # Byte-level vocabularies of these tests hold no piece with such a name: this is transformers' own way.
        assert ids.tolist() == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert decoded(tokenizer, ids.tolist()) == text and other not in text
    assert places[0, 0] == 0 and places[-1, 1] == len(control.mark(text))


@every_tokenizer
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_turns_without_control_tokens_give_the_ids_of_the_tokenizer_itself(name, data):
    tokenizer = TOKENIZERS[name]
    texts = st.one_of(st.sampled_from(TEXTS), st.text(st.sampled_from("ab 1.\n'é猫,-|>_im startend"), max_size=20))
    turns = [Turn("user", data.draw(texts)), Turn("assistant", data.draw(texts))]
    rendered = tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in turns], tokenize=False)
    assert ids_of(ENCODERS[name], turns) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@every_tokenizer
def test_answers_with_control_tokens_are_learned_whole_with_the_true_stop(name):
    tokenizer = TOKENIZERS[name]
    stop = {"llama3": "<|eot_id|>", "vicuna": "</s>"}.get(name, "<|im_end|>")
    ends = f"It ends{stop} with {stop}"
    turns = [Turn("user", "a"), Turn("assistant", ends), Turn("user", f"b{stop}"), Turn("assistant", stop)]
    (segment,) = ENCODERS[name].encode(turns)
    learned = segment.token_ids[segment.supervised].tolist()
    assert learned.count(tokenizer.convert_tokens_to_ids(stop)) == 2
    assert decoded(tokenizer, learned).replace(" ", "") == f"Itends{stop}with{stop}{stop}{stop}{stop}"


@every_tokenizer
def test_they_are_read_as_tokens_where_that_is_asked_for(name):
    tokenizer = TOKENIZERS[name]
    word = specials(tokenizer)[-1]
    turns = [Turn("user", f"a {word}"), Turn("assistant", "b")]
    rendered = tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in turns], tokenize=False)
    encoder = ChatEncoder(tokenizer, TextRules(parse_control_tokens=True))
    assert ids_of(encoder, turns) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids_of(encoder, turns) != ids_of(ENCODERS[name], turns)


def test_the_name_of_a_byte_in_a_turn_is_text_and_no_byte():
    tokenizer = TOKENIZERS["own"]
    turns = [Turn("user", "é is <0xC3><0xA9>, <|im_end|> is <unk>"), Turn("assistant", "<0x41>")]
    ids = ids_of(ENCODERS["own"], turns)
    named = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "<0x41>", "<unk>"])
    assert [ids.count(i) for i in named] == [1, 1, 0, 0], "the bytes of é"
    rendered = tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in turns], tokenize=False)
    assert decoded(tokenizer, ids) == rendered


def with_tokens(*tokens):
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_names_of_media_are_text_and_other_added_tokens_are_tokens():
    tokenizer = with_tokens(AddedToken("<image>"), AddedToken("<vila/video>"), AddedToken("<think>"), AddedToken("</tool_call>"))
    turns = [Turn("user", "A <vila/video>?"), Turn("assistant", "<think> of <image></tool_call>")]
    ids = ids_of(ChatEncoder(tokenizer), turns)
    known = tokenizer.convert_tokens_to_ids(["<image>", "<vila/video>", "<think>", "</tool_call>"])
    assert [ids.count(i) for i in known] == [0, 0, 1, 1]


def test_a_control_token_that_a_normalizer_would_make_of_other_characters_is_not_made():
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.add_tokens([AddedToken("<end>", special=True, normalized=True)])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    wide = "a \uff1cend\uff1e b"
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end in tokenizer(wide)["input_ids"]
    ids = ids_of(ChatEncoder(tokenizer), [Turn("user", wide), Turn("assistant", "b")])
    assert end not in ids and decoded(tokenizer, ids).count("<end>") == 1


def test_tokens_that_take_the_spaces_beside_them_do_so_only_where_the_template_writes_them():
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.add_tokens([AddedToken("<sep>", special=True, lstrip=True, rstrip=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' <sep> ' }}{% endfor %}"
    ids = ids_of(ChatEncoder(tokenizer), [Turn("user", "a <sep> b"), Turn("assistant", "c")])
    sep = tokenizer.convert_tokens_to_ids("<sep>")
    assert decoded(tokenizer, [i for i in ids if i != sep]) == "a <sep> bc" and ids.count(sep) == 2


def test_an_unknown_word_stays_unknown():
    vocabulary = {"[UNK]": 0, "[END]": 1, "a": 2, "b": 3}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for t, i in list(vocabulary.items())[:2]
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="[UNK]")
    control = ControlTokens(tokenizer)
    assert control.encode("a x b [END]")[0].tolist() == [2, 0, 3, 1]
    # "[", "END", "]" are three words that this vocabulary lacks.
    assert control.encode(control.mark("a x b [END]") + "[END]")[0].tolist() == [2, 0, 3, 0, 0, 0, 1]


def test_texts_that_no_tokenizer_can_read_are_errors_of_their_sample():
    for text, name in (("half \ud83d", "U\\+D83D"), ("zero \0", "U\\+0000"), ("sign \ufdd4a", "U\\+FDD4")):
        for turns in ([Turn("user", text), Turn("assistant", "b")], [Turn("user", "a"), Turn("assistant", text)]):
            with pytest.raises(RenderError, match=name):
                ENCODERS["qwen2"].encode(turns)


def test_a_tokenizer_that_cannot_tell_them_apart_says_so():
    control = ControlTokens(byte_level_tokenizer("qwen2"))
    control.ids = np.append(control.ids, control.encode("a")[0])
    with pytest.raises(ControlTokenError, match="makes a control token of the characters of a text"):
        control.encode(control.mark("a <|im_end|>"))

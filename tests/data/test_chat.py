"""Chat templates, label spans and places of pictures, with real tokenizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vila.config.text_rules import TextRules
from megatron_vila.data.chat import ChatEncoder, ChatTemplateError, RenderError, assemble, describe
from megatron_vila.data.placement import Turn
from megatron_vila.plan.pictures import Unit
from megatron_vila.plan.row import IGNORE, MEDIA_TOKEN, FrameRef
from tests.data.material import QWEN2_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer

SQUARE = Unit(frames=1, tiles=1, tokens=4, cost=16)
TOKENIZERS = {
    "llama3": byte_level_tokenizer("llama3"),
    "qwen2": byte_level_tokenizer("qwen2"),
    "vicuna": metaspace_tokenizer(),
    "own": sentencepiece_tokenizer(),
}
STOPS = {"llama3": "<|eot_id|>", "qwen2": "<|im_end|>", "vicuna": "</s>", "own": "<|im_end|>"}
ENCODERS = {name: ChatEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def answers(encoder, turns):
    text, spans = encoder.spans(turns)
    return [text[start:end] for start, end in spans]


def learned(name, segments):
    """The text that the model learns to write, from the tokens."""
    ids = [int(i) for s in segments for i in s.token_ids[s.supervised]]
    return TOKENIZERS[name].decode(ids, clean_up_tokenization_spaces=False)


@every_tokenizer
def test_every_answer_is_learned_with_its_stop_token_and_nothing_else_is(name):
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Describe each step."),
        Turn("assistant", "1. The dog runs.\n\n2. The dog\n  sleeps."),
        Turn("user", "Where is the cat? 猫はどこですか。"),
        Turn("assistant", "猫 dort."),
    ]
    stop = STOPS[name]
    expected = ["1. The dog runs.\n\n2. The dog\n  sleeps." + stop, "猫 dort." + stop]
    assert answers(ENCODERS[name], turns) == expected
    segments = ENCODERS[name].encode(turns)
    # The pieces of SentencePiece carry the space before a word.
    assert learned(name, segments).replace(" ", "") == "".join(expected).replace(" ", "")
    stop_id = TOKENIZERS[name].convert_tokens_to_ids(stop)
    (segment,) = segments
    assert segment.supervised[segment.token_ids == stop_id].sum() == 2


@every_tokenizer
def test_a_document_is_learned_whole_up_to_the_end_of_text_and_without_the_template(name):
    tokenizer, text = TOKENIZERS[name], "A cat. Two\n\ndogs \\<image> sleep."
    (segment,) = ENCODERS[name].encode([Turn("document", text)])
    own, full = (tokenizer("A", add_special_tokens=added)["input_ids"] for added in (False, True))
    first = len(full) - len(own) if name != "vicuna" else full.index(own[0])
    assert segment.token_ids[:first].tolist() == full[:first] and not segment.supervised[:first].any()
    assert segment.supervised[first:].all() and segment.token_ids[-1] == tokenizer.eos_token_id
    words = tokenizer.decode(segment.token_ids[first:-1].tolist(), clean_up_tokenization_spaces=False)
    assert words.replace(" ", "") == text.replace("\\", "").replace(" ", "")


def test_media_of_a_document_stand_at_their_markers_and_are_not_learned():
    segments = ENCODERS["qwen2"].encode([Turn("document", "<image>A cat.<image><video>B")])
    assert [TOKENIZERS["qwen2"].decode(s.token_ids.tolist()) for s in segments] == ["", "A cat.", "", "B<|im_end|>"]
    pictures = [[FrameRef(name, (0,), False, SQUARE)] for name in "abc"]
    document = assemble(segments, pictures, [], [], "x")
    assert (document.labels != IGNORE).sum() == sum(len(s.token_ids) for s in segments)
    assert describe(document, TOKENIZERS["qwen2"]).count("[[") == 2


def test_a_tokenizer_without_an_end_of_text_cannot_train_documents():
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.eos_token = None
    with pytest.raises(RenderError, match="no token that ends a text"):
        ChatEncoder(tokenizer).encode([Turn("document", "A")])


@every_tokenizer
def test_an_answer_equal_to_the_words_around_it_is_still_found(name):
    for answer in ("assistant", "a", "<", "|", "Describe", "", " ", "\n"):
        turns = [
            Turn("user", "assistant a"),
            Turn("assistant", answer),
            Turn("user", answer),
            Turn("assistant", answer),
        ]
        found = answers(ENCODERS[name], turns)
        assert len(found) == 2
        for text in found:
            assert text.strip() == answer.strip() + STOPS[name]


@every_tokenizer
def test_there_is_at_most_one_bos(name):
    tokenizer = TOKENIZERS[name]
    segments = ENCODERS[name].encode([Turn("user", "<image><image> What?"), Turn("assistant", "A cat.")])
    ids = np.concatenate([s.token_ids for s in segments])
    if tokenizer.bos_token_id is not None:
        assert (ids == tokenizer.bos_token_id).sum() == 1
        assert ids[0] == tokenizer.bos_token_id


@every_tokenizer
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_answers_are_learned_exactly(name, data):
    texts = st.text(st.sampled_from("ab 1.\n'é猫,-"), max_size=12).map(str.strip)
    turns = []
    for _ in range(data.draw(st.integers(1, 3))):
        turns += [Turn("user", data.draw(texts)), Turn("assistant", data.draw(texts))]
    wanted = "".join(turn.text + STOPS[name] for turn in turns if turn.role == "assistant")
    (segment,) = ENCODERS[name].encode(turns)
    got = learned(name, [segment])
    if name == "vicuna":  # its pieces carry the space before a word
        wanted, got = wanted.replace(" ", ""), got.replace(" ", "")
    assert got == wanted


def test_a_long_conversation_is_not_rendered_anew_for_each_answer(monkeypatch):
    encoder, rendered = ENCODERS["qwen2"], []
    render = encoder._render
    monkeypatch.setattr(encoder, "_render", lambda turns: rendered.append(len(turns)) or render(turns))
    turns = [turn for i in range(200) for turn in (Turn("user", f"q{i}"), Turn("assistant", f"a{i}"))]
    assert answers(encoder, turns) == [f"a{i}<|im_end|>" for i in range(200)]
    assert sum(rendered) <= 6 * len(turns)


def test_a_template_that_writes_a_turn_by_its_number_is_followed():
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] ~ '<|im_end|>' }}{% endfor %}"
    turns = [turn for i in range(3) for turn in (Turn("user", "6assistant"), Turn("assistant", f"a{i}"))]
    assert answers(ChatEncoder(tokenizer), turns) == [f"a{i}<|im_end|>" for i in range(3)]


def test_text_and_pictures_take_turns_and_labels_are_shifted_over_the_whole_document():
    tokenizer, encoder = TOKENIZERS["qwen2"], ENCODERS["qwen2"]
    newline = tokenizer("\n")["input_ids"]
    segments = encoder.encode([Turn("user", "<image>\nWhat? <video>"), Turn("assistant", "Yes.\nA cat.")])
    assert len(segments) == 3
    image = (FrameRef("a.png", (0,), False, SQUARE),)
    video = tuple(FrameRef("b.mp4", (i,), True, SQUARE) for i in (0, 7))
    document = assemble(segments, [image, video], [5, 6], newline, "s")
    frames_end = document.frame_starts + 4
    assert document.frames == (*image, *video)
    for start, end in zip(document.frame_starts, frames_end, strict=True):
        assert (document.token_ids[start:end] == MEDIA_TOKEN).all()
    assert (document.token_ids == MEDIA_TOKEN).sum() == 12
    assert document.token_ids[frames_end[0] : frames_end[0] + 2].tolist() == [5, 6]
    assert document.token_ids[frames_end[1]] == document.token_ids[frames_end[2]] == newline[0]
    assert len(document) == sum(len(s.token_ids) for s in segments) + 12 + 2 + 2
    trained = np.flatnonzero(document.labels != IGNORE)
    assert (document.labels[trained] == document.token_ids[trained + 1]).all()
    assert tokenizer.decode(document.labels[trained].tolist()) == "Yes.\nA cat.<|im_end|>"
    assert document.labels[-1] == IGNORE


def test_pictures_and_separators_right_before_an_answer_are_not_learned():
    bare = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    segments = ChatEncoder(with_template(bare)).encode([Turn("user", "Draw: <image>"), Turn("assistant", "done")])
    document = assemble(segments, [(FrameRef("a.png", (0,), False, SQUARE),)], [5], [], "s")
    trained = document.labels[document.labels != IGNORE]
    assert (trained >= 0).all()
    assert 5 not in document.labels
    assert TOKENIZERS["qwen2"].decode(trained.tolist()) == "done<|im_end|>"


def test_a_marker_outside_a_human_turn_is_text():
    turns = [Turn("system", "Speak of <image>."), Turn("user", "A tag?"), Turn("assistant", "A <video> tag.")]
    (segment,) = ENCODERS["llama3"].encode(turns)
    text = TOKENIZERS["llama3"].decode(segment.token_ids.tolist())
    assert "Speak of <image>." in text
    assert learned("llama3", [segment]) == "A <video> tag.<|eot_id|>"


def test_a_document_is_described_for_the_log():
    segments = ENCODERS["qwen2"].encode([Turn("user", "<video>\nWhat?"), Turn("assistant", "A cat.")])
    document = assemble(segments, [tuple(FrameRef("/data/b.mp4", (i,), True, SQUARE) for i in range(8))], [], [], "clip 3")
    text = describe(document, TOKENIZERS["qwen2"])
    assert text.startswith(f"sample clip 3: {len(document)} tokens")
    assert "user\n{8 frames of /data/b.mp4, 4 tokens each}\nWhat?" in text
    assert "assistant\n[[A cat.<|im_end|>]]\n" in text


def with_template(template):
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_earlier_turns_is_refused():
    only_last = QWEN2_TEMPLATE.replace("message['content']", "(message['content'] if loop.last else '(cut)')")
    with pytest.raises(ChatTemplateError, match="changes earlier turns when later ones follow"):
        ChatEncoder(with_template(only_last))


def test_a_template_that_drops_media_markers_is_refused_for_that_sample():
    encoder = ChatEncoder(with_template(QWEN2_TEMPLATE.replace("message['content']", "message['content'][:5]")))
    with pytest.raises(RenderError, match="shows 0 of 1 media markers"):
        encoder.encode([Turn("user", "What is <image>?"), Turn("assistant", "A cat.")])


def test_a_conversation_that_the_template_refuses_is_an_error_of_that_sample():
    strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('start with a user turn') }}{% endif %}"
    encoder = ChatEncoder(with_template(strict + QWEN2_TEMPLATE))
    with pytest.raises(RenderError, match="start with a user turn"):
        encoder.encode([Turn("assistant", "A cat.")])


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        ChatEncoder(with_template(None))


def test_where_white_space_ends_an_answer_it_is_learned_as_the_stop():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    turns = [Turn("user", "Sure?"), Turn("assistant", "Yes."), Turn("user", "And now?")]
    assert answers(ChatEncoder(with_template(template)), turns) == ["Yes.\n"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, "") for name in TOKENIZERS), ("llama3", "llama_3"), ("vicuna", "vicuna_v1"), ("qwen2", "hermes-2")],
)
def test_a_prompt_is_what_training_shows_before_the_answer_whatever_that_is(name, rule):
    encoder = ChatEncoder(TOKENIZERS[name], TextRules(template=rule))
    for turns in (
        [Turn("user", "<video>What is shown?")],
        [Turn("system", "Be brief."), Turn("user", "<image>Ou est le chat?"), Turn("assistant", "Il dort."), Turn("user", "42?")],
    ):
        prompt = encoder.prompt(turns)
        assert not any(segment.supervised.any() for segment in prompt)
        assert turns[-1].text[-3:] in TOKENIZERS[name].decode(prompt[-1].token_ids)
        for answer in ("Il dort.", "42", "a", "1\n2", "(c)"):
            trained = encoder.encode([*turns, Turn("assistant", answer)])
            assert len(prompt) == len(trained)
            for mine, theirs in zip(prompt[:-1], trained[:-1], strict=True):
                assert np.array_equal(mine.token_ids, theirs.token_ids)
            length = len(prompt[-1].token_ids)
            assert np.array_equal(prompt[-1].token_ids, trained[-1].token_ids[:length])
            # What is left out of it is the answer's, or what the answer's first token may be joined with.
            (first, *_) = np.flatnonzero(trained[-1].supervised[length:])
            assert first <= 1


def test_a_prompt_ends_with_the_header_of_the_answer():
    (segment,) = ENCODERS["qwen2"].prompt([Turn("user", "Which color?")])
    assert TOKENIZERS["qwen2"].decode(segment.token_ids).endswith("Which color?<|im_end|>\n<|im_start|>assistant\n")

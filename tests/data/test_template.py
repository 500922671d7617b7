"""Chat templates: the clock they see, chance in them, and VILA's own prompts token by token."""

import numpy as np
import pytest

from megatron_vila.config.text_rules import DEFAULT_CLOCK, TEMPLATES, TextRules
from megatron_vila.data.chat import ChatEncoder
from megatron_vila.data.placement import Turn
from megatron_vila.data.template import NAMED, ChatTemplate, ChatTemplateError, RenderError
from tests.data.material import QWEN2_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y, %-d.%-m. %H:%M %j %%d') + '. ' }}" + QWEN2_TEMPLATE
TURNS = [Turn("user", "a?"), Turn("assistant", "b"), Turn("user", "c?"), Turn("assistant", "d e")]


def with_template(template):
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = template
    return tokenizer


def rendered(template, clock=DEFAULT_CLOCK):
    return ChatTemplate(with_template(template), "", clock).render([{"role": "user", "content": "a"}])


def test_a_template_sees_the_clock_of_the_settings_and_never_that_of_the_machine():
    assert rendered(DATED).startswith("Today: 26 Jul 2024, 26.7. 00:00 208 %d. <|im_start|>")
    assert rendered(DATED, "2031-02-03T04:05").startswith("Today: 03 Feb 2031, 3.2. 04:05 034 %d. ")
    guarded = "{% if strftime_now is defined %}{% macro d() %}{{ strftime_now('%Y') }}{% endmacro %}{{ d() }}{% endif %}\n\nx"
    assert rendered(guarded) == "2024\nx"
    assert rendered("\n\n{{ strftime_now('%Y') }}") == "\n\n2024", "white space before a template stays"


def test_the_clock_changes_what_is_remembered_of_an_encoder_and_its_tokens():
    encoders = [ChatEncoder(with_template(DATED), TextRules(template_clock=clock)) for clock in ("2024-07-26", "2024-07-27")]
    assert len({encoder.fingerprint() for encoder in encoders}) == 2
    assert len({tuple(encoder.encode(TURNS)[0].token_ids.tolist()) for encoder in encoders}) == 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ['a', 'b'] | random }}", "it draws lots with random"),
        ("{{ lipsum(1) }}", "it draws lots with lipsum"),
        ("{{ messages.index }}", "it writes another text each time, such as"),
        ("{% if %}", "cannot be read|cannot be rendered"),
    ],
)
def test_a_template_that_does_not_write_the_same_twice_is_refused_with_the_reason(template, reason):
    with pytest.raises(ChatTemplateError, match=reason):
        rendered(template + QWEN2_TEMPLATE)
    assert rendered("{{ 'a random walk, lipsum' }}") == "a random walk, lipsum"


def test_whatever_a_template_raises_is_an_error_of_its_sample():
    fails = "{% for m in messages %}{% if 'no' in m['content'] %}{{ m['content'] + 1 }}{% endif %}{% endfor %}"
    encoder = ChatEncoder(with_template(fails + QWEN2_TEMPLATE))
    with pytest.raises(RenderError, match="the chat template raises TypeError"):
        encoder.encode([Turn("user", "no"), Turn("assistant", "b")])
    encoder.encode(TURNS)


def official_prompt(name, turns, asking=False):
    """``Conversation.get_prompt`` of VILA for its ``conv_templates``, written anew from its source."""
    messages = [(turn.role == "assistant", turn.text) for turn in turns]
    if name == "vicuna_v1":
        text = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
            "and polite answers to the user's questions. "
        )
        for answer, message in messages:
            text += f"ASSISTANT: {message}</s>" if answer else f"USER: {message} "
        return text + "ASSISTANT:" * asking
    if name == "hermes-2":
        text = "<|im_start|>system\nAnswer the questions.<|im_end|>"
        for answer, message in messages:
            text += f"<|im_start|>{'assistant' if answer else 'user'}\n{message}<|im_end|>"
        return text + "<|im_start|>assistant\n" * asking
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
        "able to understand the visual content that the user provides, and assist the user with a variety of tasks using "
        "natural language.<|eot_id|>"
    )
    for place, (answer, message) in enumerate(messages):
        stop = "<|end_of_text|>" if place == len(messages) - 1 and not asking else "<|eot_id|>"
        text += f"<|start_header_id|>{'assistant' if answer else 'user'}<|end_header_id|>\n\n{message}{stop}"
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n" * asking


TOKENIZERS = {
    "llama_3": byte_level_tokenizer("llama3"),
    "vicuna_v1": metaspace_tokenizer(),
    "hermes-2": byte_level_tokenizer("qwen2"),
}


def test_every_name_has_a_prompt():
    assert tuple(NAMED) == TEMPLATES


@pytest.mark.parametrize("name", NAMED)
def test_a_named_prompt_is_the_official_text_and_its_tokens(name):
    tokenizer = TOKENIZERS[name]
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    template = ChatTemplate(tokenizer, name, DEFAULT_CLOCK)
    assert template.render(messages) == official_prompt(name, TURNS)
    assert template.render(messages[:3], add_generation_prompt=True) == official_prompt(name, TURNS[:3], asking=True)
    (segment,) = ChatEncoder(tokenizer, TextRules(template=name)).encode(TURNS)
    # VILA passes the prompt to the tokenizer as any text, which adds its BOS.
    assert segment.token_ids.tolist() == tokenizer(official_prompt(name, TURNS))["input_ids"]
    assert (segment.token_ids == tokenizer.bos_token_id).sum() == {"llama_3": 2, "vicuna_v1": 0, "hermes-2": 0}[name]


@pytest.mark.parametrize(
    ("name", "stops"),
    [("llama_3", ["<|eot_id|>", "<|end_of_text|>"]), ("vicuna_v1", ["</s>"]), ("hermes-2", ["<|im_end|>"])],
)
def test_an_answer_is_learned_with_the_stop_that_stands_after_it(name, stops):
    tokenizer = TOKENIZERS[name]
    encoder = ChatEncoder(tokenizer, TextRules(template=name))
    assert encoder.stops == tuple(tokenizer.convert_tokens_to_ids(stops))
    text, spans = encoder.spans(TURNS)
    assert [text[start:end] for start, end in spans] == [f"b{stops[0]}", f"d e{stops[-1]}"]
    (segment,) = encoder.encode(TURNS)
    learned = segment.token_ids[segment.supervised]
    assert np.isin(learned, encoder.stops).sum() == 2
    assert not segment.supervised[0]


def test_a_system_text_of_a_record_takes_the_place_of_the_prompts_own():
    for name in NAMED:
        text = ChatTemplate(TOKENIZERS[name], name, DEFAULT_CLOCK).render(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}], add_generation_prompt=True
        )
        assert text.count("Be brief.") == 1 and "ssistant." not in text and "Answer the questions" not in text

"""The standard ``generate`` with an exported VILA: KV cache, batches, several answers, processors of scores."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import megatron_vila.hf  # noqa: F401
from tests.data.material import write_video
from tests.hf.megatron_side import config, export
from tests.ranks import pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pool.run(1, export, config(folder, init_std=0.6), folder, ("vila",))
    write_video(folder / "long.mp4", 20)
    write_video(folder / "short.mp4", 2)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "vila")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "vila")


@pytest.fixture(scope="module")
def chats(folder):
    """Three prompts of different lengths and numbers of pictures."""

    def ask(text, *videos):
        parts = [{"type": "video", "path": str(folder / name)} for name in videos]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    return [
        ask("Name the colour: red, green, blue or yellow."),
        ask("What is shown in the video?", "long.mp4"),
        ask("Which?", "short.mp4", "long.mp4"),
    ]


def inputs_of(processor, chats):
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)


def new_tokens(model, inputs, **how):
    how = {"max_new_tokens": 8, "do_sample": False} | how
    return model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :].tolist()


def test_media_token_ids_lie_beyond_the_embedding_table_here(model):
    rows = model.get_input_embeddings().num_embeddings
    assert min(model.config.image_token_id, model.config.video_token_id) >= rows


def test_tokens_that_a_user_adds_do_not_get_the_ids_of_pictures(folder, chats):
    model, processor = (auto.from_pretrained(folder / "vila") for auto in (AutoModelForCausalLM, AutoProcessor))
    before = inputs_of(processor, chats[2:])
    with torch.no_grad():
        wanted = model(**before).logits
        rows = wanted.shape[-1]
        processor.tokenizer.add_tokens([f"<added {n}>" for n in range(5)])
        model.resize_token_embeddings(len(processor.tokenizer))
        after = inputs_of(processor, chats[2:])
        assert torch.equal(after["input_ids"], before["input_ids"])
        assert torch.equal(model(**after).logits[..., :rows], wanted)
        added = processor(text="".join(f"<added {n}>" for n in range(5)))
        assert added["input_ids"].max() == len(processor.tokenizer) - 1
        assert model(**added).logits.isfinite().all()


def test_visual_tokens_on_a_cache_need_their_pictures(model, processor, chats):
    with torch.no_grad():
        cache = model(**inputs_of(processor, chats[:1]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="8 visual tokens but there are no pixel_values"):
            model(input_ids=torch.full((1, 8), model.config.video_token_id), past_key_values=cache)


def test_labels_that_are_a_copy_of_the_inputs_learn_nothing_of_visual_tokens(model, processor, chats):
    inputs = inputs_of(processor, chats[2:])
    labels = inputs["input_ids"].clone()
    masked = labels.masked_fill(labels >= model.config.text_config.vocab_size, -100)
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, model(**inputs, labels=masked).loss)


def test_features_of_videos_are_those_of_their_frames(model, processor, chats):
    pixels = inputs_of(processor, chats[1:2])["pixel_values"]
    with torch.no_grad():
        frames = model.get_image_features(pixels).pooler_output
        assert torch.equal(model.get_video_features(pixels).pooler_output, frames)
        assert torch.equal(model.get_video_features(pixels[None]).pooler_output, frames[None])


@pytest.mark.parametrize(
    ("asked", "tower", "language"),
    [("eager", "eager", "eager"), (None, "sdpa", "sdpa"), ({"vision_config": "eager", "text_config": "sdpa"}, "eager", "sdpa")],
)
def test_the_attention_asked_for_reaches_tower_and_language_model(folder, asked, tower, language):
    model = AutoModelForCausalLM.from_pretrained(folder / "vila", attn_implementation=asked)
    layer = model.model.vision_tower.vision_model.encoder.layers[0]
    assert layer.self_attn.config._attn_implementation == tower
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == language
    model.set_attn_implementation("eager")
    assert layer.self_attn.config._attn_implementation == "eager"


def test_a_batch_gives_what_each_prompt_gives_alone(model, processor, chats):
    alone = [new_tokens(model, inputs_of(processor, [chat]))[0] for chat in chats]
    assert new_tokens(model, inputs_of(processor, chats)) == alone
    assert new_tokens(model, inputs_of(processor, chats[::-1])) == alone[::-1]
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_pictures_are_encoded_once_and_only_in_the_prefill(model, processor, chats):
    seen = []
    handle = model.model.mm_projector.layers.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    lengths = []
    other = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    inputs = inputs_of(processor, chats)
    new_tokens(model, inputs)
    handle.remove(), other.remove()
    assert sum(seen) == len(inputs["pixel_values"])
    assert lengths == [inputs["input_ids"].shape[1]] + [1] * 7


@pytest.mark.parametrize(
    "cache", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1, "top_k": None}]
)
def test_the_cache_does_not_change_the_answer(model, processor, chats, cache):
    inputs = inputs_of(processor, chats)
    assert new_tokens(model, inputs, **cache) == new_tokens(model, inputs)


@pytest.mark.parametrize("how", ["an assistant", "words of the prompt"])
def test_a_draft_that_is_checked_gives_the_same_answer_and_the_assistant_sees_the_pictures(folder, model, processor, chats, how):
    inputs = inputs_of(processor, chats[2:])
    assistant, seen = AutoModelForCausalLM.from_pretrained(folder / "vila"), []
    assistant.generation_config.eos_token_id = None
    assistant.model.mm_projector.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    asked = {"assistant_model": assistant} if how == "an assistant" else {"prompt_lookup_num_tokens": 2}
    assert new_tokens(model, inputs, **asked) == new_tokens(model, inputs)
    assert seen == ([len(inputs["pixel_values"])] if how == "an assistant" else [])


def test_a_second_question_reads_the_cache_and_encodes_only_its_own_pictures(folder, model, processor, chats):
    first = inputs_of(processor, chats[1:2])
    known = model.generate(**first, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    more = processor(text="Then <video>?", videos=str(folder / "short.mp4"))
    inputs = {
        "input_ids": torch.cat([known.sequences, more["input_ids"]], dim=1),
        "pixel_values": torch.cat([first["pixel_values"], more["pixel_values"]]),
    }
    seen = []
    handle = model.model.mm_projector.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    found = new_tokens(model, inputs, past_key_values=known.past_key_values)
    handle.remove()
    assert seen == [len(more["pixel_values"])]
    assert found == new_tokens(model, inputs)


def test_several_answers_of_a_prompt_see_the_pictures_of_that_prompt(model, processor, chats):
    inputs, seen = inputs_of(processor, chats), []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    together = new_tokens(model, inputs, num_beams=3, num_return_sequences=2)
    prefill = seen[0]
    model(**inputs)
    handle.remove()
    assert torch.allclose(prefill, seen[-1].repeat_interleave(3, dim=0), atol=1e-6)
    alone = [new_tokens(model, inputs_of(processor, [chat]), num_beams=3, num_return_sequences=2) for chat in chats]
    assert together == [tokens for pair in alone for tokens in pair]


def test_processors_of_scores_meet_media_tokens_that_have_no_score(model, processor, chats):
    inputs = inputs_of(processor, chats)
    for tokens, prompt in zip(
        new_tokens(model, inputs, no_repeat_ngram_size=1), inputs["input_ids"].tolist(), strict=True
    ):
        assert len(set(tokens)) == len(tokens) and not set(tokens) & set(prompt)
    plain = new_tokens(model, inputs)
    assert new_tokens(model, inputs, repetition_penalty=1.0001) == plain
    torch.manual_seed(0)
    sampled = new_tokens(model, inputs, do_sample=True, top_p=0.9, min_p=0.01, typical_p=0.9, temperature=2.0)
    assert max(max(tokens) for tokens in sampled) < model.config.text_config.vocab_size


def test_the_eos_of_the_files_ends_an_answer_and_padding_follows(folder, processor, chats):
    model = AutoModelForCausalLM.from_pretrained(folder / "vila")
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    inputs = inputs_of(processor, chats)
    first = new_tokens(model, inputs)[1][1]
    model.generation_config.eos_token_id = first
    ended = new_tokens(model, inputs)[1]
    assert ended[: ended.index(first) + 1] == ended[: ended.index(first)] + [first]
    assert set(ended[ended.index(first) + 1 :]) <= {processor.tokenizer.pad_token_id}


def test_labels_give_the_loss_of_a_causal_model_and_gradients_reach_every_part(model, processor, chats):
    inputs = inputs_of(processor, chats)
    labels = inputs["input_ids"].masked_fill(
        (inputs["attention_mask"] == 0) | (inputs["input_ids"] >= model.config.text_config.vocab_size), -100
    )
    output = model(**inputs, labels=labels)
    wanted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, wanted)
    output.loss.backward()
    for part in (model.model.language_model, model.model.mm_projector, model.model.vision_tower.vision_model.embeddings):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters() if p.requires_grad and p.dim() > 1)
    model.zero_grad()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "no pixel_values"),
        ({"pixel_values": torch.zeros(1, 3, 56, 56)}, r"1 pictures of 4 tokens, which makes 4"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.tensor([[1, 400]])}, r"hold the token 400, but .* vocab_size=400; use the processor"),
        ({"image_sizes": torch.ones(1, 2)}, "got image_sizes, which the processor of another model makes"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 16)}, "pixel_values need input_ids"),
    ],
)
def test_places_and_pictures_that_do_not_belong_together_are_refused(model, processor, chats, change, message):
    inputs = dict(inputs_of(processor, [chats[2]])) | change
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_nothing_of_it_needs_megatron_core(folder):
    script = (
        "import sys\n"
        "sys.modules['megatron'] = None\n"
        "import megatron_vila.hf\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'vila')!r})\n"
        f"processor = AutoProcessor.from_pretrained({str(folder / 'vila')!r})\n"
        "inputs = processor(text='Hello <image>', images=__import__('PIL.Image').Image.new('RGB', (9, 9)))\n"
        "print(model.generate(**inputs, max_new_tokens=2).shape[1] - inputs['input_ids'].shape[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "2"

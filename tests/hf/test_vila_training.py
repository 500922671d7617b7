"""A VILA in the programs with which people train: TRL's SFTTrainer and PEFT."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID
from tests.hf.megatron_side import config, export
from tests.ranks import pool

RATE, STEPS = 0.3, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pool.run(1, export, config(folder, init_std=0.3), folder, ("vila", "flat"))
    return folder


def rows(kind):
    """Questions and answers with one picture, none and two."""
    draw = np.random.default_rng(3)
    pictures = [Image.fromarray(draw.integers(0, 255, (30 + n, 50, 3), dtype=np.uint8)) for n in range(3)]
    shown = [pictures[:1], [], pictures[1:]] if kind != "text" else [[]] * 3
    made = []
    for number, images in enumerate(shown):
        question = {"role": "user", "content": "What is shown here? " * (number + 1)}
        answer = {"role": "assistant", "content": f"It is number {number}."}
        row = {"prompt": [question], "completion": [answer]} if kind == "completions" else {"messages": [question, answer]}
        made.append(row if kind == "text" else {**row, "images": images})
    return made


def plain_losses(folder, kind):
    """Losses of a plain loop over all rows at once: each is a batch of its own, its tokens and labels are put together here."""
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoProcessor))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for _ in range(STEPS):
        total, count = 0.0, 0
        for row in rows(kind):
            turns = row.get("messages") or row["prompt"] + row["completion"]
            images = [{"type": "image", "image": image} for image in row.get("images", [])]
            first = {"role": "user", "content": [*images, {"type": "text", "text": turns[0]["content"]}]}
            inputs = processor.apply_chat_template([first, turns[1]], tokenize=True, return_dict=True)
            asked = processor.apply_chat_template([first], tokenize=True, add_generation_prompt=True)[0]
            targets = torch.where(inputs["input_ids"] >= 400, -100, inputs["input_ids"])[0, 1:]
            if kind == "completions":
                targets[: len(asked) - 1] = -100
            logits = model(**inputs).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            count += int((targets != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return losses


@pytest.mark.parametrize(("kind", "layout"), [("messages", "flat"), ("completions", "vila"), ("text", "flat")])
def test_sft_trainer_trains_an_exported_folder_as_a_plain_loop(folder, tmp_path, kind, layout):
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=None,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model=str(folder / layout), args=arguments, train_dataset=Dataset.from_list(rows(kind)))
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    wanted = plain_losses(folder / layout, kind)
    assert wanted[-1] < wanted[0] - 0.05
    assert found == pytest.approx(wanted, rel=1e-5)


def batch(pictures=2):
    draw = torch.Generator().manual_seed(pictures)
    ids = torch.randint(0, 380, (1, 9 + 5 * pictures), generator=draw)
    for number in range(pictures):
        ids[0, 2 + 5 * number : 6 + 5 * number] = IMAGE_TOKEN_ID
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"pixel_values": torch.rand(pictures, 3, 56, 56, generator=draw)} if pictures else {})


def adapted(folder, settings):
    """A model with an adapter, after three steps with pictures and without."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for pictures in (2, 0, 1):
        inputs = batch(pictures)
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
    return model.eval()


LORA = {
    "language model and tower": ({"target_modules": ["q_proj", "v_proj"]}, {"language_model", "vision_tower"}),
    "language model": ({"target_modules": r".*language_model.*(q_proj|down_proj)"}, {"language_model"}),
    "tower": ({"target_modules": r".*vision_tower.*(k_proj|fc1)"}, {"vision_tower"}),
    "embeddings, projector whole": (
        {"target_modules": ["embed_tokens", "k_proj"], "modules_to_save": ["mm_projector"]},
        {"language_model", "vision_tower", "mm_projector"},
    ),
    "tokens": ({"target_modules": ["o_proj"], "trainable_token_indices": [3, 4]}, {"language_model"}),
}


@pytest.mark.parametrize("case", LORA)
@torch.no_grad()
def test_lora_trains_the_parts_that_run_comes_back_and_merges(folder, tmp_path, case):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings, parts = LORA[case]
    with torch.enable_grad():
        model = adapted(folder / "flat", peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {part for part in ("language_model", "vision_tower", "mm_projector") if any(part in name for name in trained)} == parts
    assert not any("encoder.layers.2" in name for name in trained), "a layer behind the selected one"
    inputs, before = batch(), AutoModelForCausalLM.from_pretrained(folder / "flat")
    wanted = model(**inputs).logits
    assert (wanted - before(**inputs).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(before, tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, wanted)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(**inputs).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@torch.no_grad()
def test_prompts_are_tuned_with_pictures_behind_them(folder, tmp_path, kind):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    with torch.enable_grad():
        model = adapted(folder / "flat", getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    inputs = batch()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "flat"), tmp_path).eval()
    wanted = model(**inputs).logits
    assert torch.equal(again(**inputs).logits, wanted)
    if kind == "PromptTuningConfig":
        table, base = model.get_input_embeddings(), model.get_base_model()
        seen = inputs["input_ids"] == IMAGE_TOKEN_ID
        made = table(inputs["input_ids"].masked_fill(seen, 0))
        made[seen] = base.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        whole = torch.cat([model.get_prompt(1), made], dim=1)
        assert torch.allclose(wanted, base(inputs_embeds=whole).logits, atol=1e-6)
    token = model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None)[0, -1]
    assert token == wanted[0, -1].argmax()

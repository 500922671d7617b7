"""Trainers under MM-SP train like a stock Trainer in one process with the same samples."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

from megatron_vila.hf.mm_sp import enable_mm_sp
from tests.hf.mm_sp_cases import build, text_sample, video_sample
from tests.hf.mm_sp_qwen_cases import qwen_sample
from tests.hf.mm_sp_trainer_ranks import Run, SharedDPOTrainer, SharedTrainer, largest_difference, launched, pad, train
from tests.ranks import pool

# Supervised tokens differ from sample to sample, and the number of samples divides into no batch.
TEXTS = [text_sample(seed, 7 + 5 * seed % 14, slice(seed % 4, None)) for seed in range(13)]
VIDEOS = [video_sample(seed, [-3 - seed % 3, 2, -2 - seed % 4]) for seed in range(8)]
MEDIA = [
    qwen_sample("qwen2_5_vl", seed, [2 + seed % 3, *[[(2, 4)], [(2, 4, 2)], [], [(1, 2, 2), 2, (4, 2)]][seed % 4], 3 + seed % 5])
    for seed in range(8)
]
"""With a picture, a video, text only, and both."""

CLOSE = 1e-5
PAGE = Path(__file__).parents[2] / "docs/mm_sp_trainer.md"


@pytest.mark.parametrize(
    "name, processes, layout, accumulate, settings",
    [
        ("qwen2", 4, (2, 2), 4, {"activation_checkpointing": True}),
        ("qwen2_5_vl", 4, (2, 1), 1, {}),
    ],
)
def test_trainer_trains_evaluates_and_resumes_like_one_process(name, processes, layout, accumulate, settings, tmp_path):
    replicas = processes // (layout[0] * layout[1])
    samples = MEDIA if name == "qwen2_5_vl" else TEXTS
    common = {"include_num_input_tokens_seen": "non_padding", **settings}
    common |= {"gradient_accumulation_steps": accumulate, "per_device_eval_batch_size": 2}
    arguments = {"data_collator": pad, "eval_dataset": samples[:5]}
    whole = common | {"per_device_train_batch_size": 2 * replicas}
    stock = Run(Trainer, name, samples, str(tmp_path / "stock"), None, whole, arguments)
    saved = {"save_strategy": "steps", "save_steps": 3}
    shared = Run(Trainer, name, samples, str(tmp_path / "shared"), layout, common | saved, arguments)
    (wanted,) = pool.run(1, train, replace(stock, evaluate=True))
    for found in pool.run(processes, train, replace(shared, evaluate=True)):
        assert largest_difference(found, wanted) < CLOSE
        assert found["tokens"] == wanted["tokens"]
    checkpoint = str(tmp_path / "shared/checkpoint-3")
    # A stock Trainer does not load the weights of checkpoints of Qwen2.5-VL, its own included, and only warns.
    resumed, count = (shared, processes) if name == "qwen2_5_vl" else (stock, 1)
    for found in pool.run(count, train, replace(resumed, resume=checkpoint)):
        assert largest_difference(found, without_evaluation(wanted)) < CLOSE


def without_evaluation(run: dict) -> dict:
    return run | {"evaluation": {}}



TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <e>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<p>", "<e>", "user", "assistant", *(f"w{number}" for number in range(56))]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<p>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<p>", eos_token="<e>", chat_template=TEMPLATE)


def words(seed: int, count: int) -> str:
    return " ".join(f"w{number}" for number in torch.randint(0, 56, (count,), generator=torch.Generator().manual_seed(seed)))


TALKS = [
    [{"role": role, "content": words(9 * seed + turn, 2 + (5 * seed + turn) % 7)} for turn, role in enumerate(roles)]
    for seed, roles in enumerate([["user", "assistant"] * (1 + seed % 2) for seed in range(12)])
]
QUESTIONS = [{"prompt": words(seed, 2 + seed % 5), "completion": " " + words(50 + seed, 1 + 3 * seed % 7)} for seed in range(13)]
LONE_TEXTS = [{"text": words(seed, 3 + 5 * seed % 14)} for seed in range(24)]
LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "gate_proj"])


@pytest.mark.parametrize(
    "name, processes, layout, records, settings, arguments",
    [
        ("llama", 2, (2, 1), LONE_TEXTS, {"packing": True, "max_length": 20, "eval_packing": False}, {}),
        ("qwen2", 2, (1, 2), QUESTIONS, {"gradient_accumulation_steps": 4}, {"peft_config": LORA}),
        ("qwen2", 4, (2, 1), [{"messages": talk} for talk in TALKS], {"assistant_only_loss": True, "loss_type": "dft"}, {}),
    ],
    ids=["packing", "lora", "assistant"],
)
def test_sft_of_trl_trains_and_evaluates_like_one_process(name, processes, layout, records, settings, arguments, tmp_path):
    replicas = processes // (layout[0] * layout[1])
    data = Dataset.from_list(records)
    common = {"per_device_eval_batch_size": 2, **settings}
    arguments = {"processing_class": tokenizer(), "eval_dataset": data.select(range(5)), **arguments}
    whole = common | {"per_device_train_batch_size": 2 * replicas}
    stock = Run(SFTTrainer, name, data, str(tmp_path / "stock"), None, whole, arguments, evaluate=True)
    (wanted,) = pool.run(1, train, stock)
    if replicas > 1:
        # TRL's means over the steps of an evaluation; there are fewer steps.
        wanted["evaluation"] = {"eval_loss": wanted["evaluation"]["eval_loss"]}
    shared = replace(stock, out=str(tmp_path / "shared"), layout=layout, settings=common)
    for found in pool.run(processes, train, shared):
        assert largest_difference(found, wanted) < CLOSE


PAIRS = [
    {
        name: f" {words(seed + first, 1 + factor * seed % 8)}"
        for name, first, factor in (("prompt", 0, 1), ("chosen", 30, 5), ("rejected", 60, 3))
    }
    for seed in range(8)
]


@pytest.mark.parametrize(
    "processes, layout, evaluated, settings, arguments",
    [
        (2, (2, 1), 5, {"gradient_accumulation_steps": 2}, {"peft_config": LORA}),
        (4, (1, 2), 8, {"loss_type": ["ipo", "sigmoid"], "loss_weights": [0.02, 1.0]}, {"ref_model": "qwen2"}),
    ],
    ids=["lora", "reference"],
)
def test_dpo_of_trl_trains_and_evaluates_like_one_process(processes, layout, evaluated, settings, arguments, tmp_path):
    data = Dataset.from_list(PAIRS)
    common = {"per_device_eval_batch_size": 2, "learning_rate": 0.1, **settings}
    arguments = {"processing_class": tokenizer(), "eval_dataset": data.select(range(evaluated)), **arguments}
    whole = common | {"per_device_train_batch_size": 2 * processes // (layout[0] * layout[1])}
    stock = Run(DPOTrainer, "qwen2", data, str(tmp_path / "stock"), None, whole, arguments, evaluate=True)
    (wanted,) = pool.run(1, train, stock)
    wanted["evaluation"] = {"eval_loss": wanted["evaluation"]["eval_loss"]}
    shared = replace(stock, out=str(tmp_path / "shared"), layout=layout, settings=common)
    for found in pool.run(processes, train, shared):
        assert largest_difference(found, wanted) < CLOSE


def test_trainer_computes_in_bfloat16_under_autocast(tmp_path):
    settings = {"bf16": True, "learning_rate": 0.05, "max_steps": 2}
    stock = Run(Trainer, "llava_onevision", VIDEOS, str(tmp_path), None, settings, {"data_collator": pad})
    (wanted,) = pool.run(1, train, stock)
    for found in pool.run(2, train, replace(stock, layout=(1, 2))):
        assert 1e-6 < largest_difference(found, wanted) < 0.01


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_trainer_shards_weights_by_fsdp2_saves_and_resumes(lora, tmp_path):
    adam = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 0.03}
    arguments = {"data_collator": pad, "eval_dataset": TEXTS[:5]}
    stock = Run(Trainer, "qwen2", TEXTS, str(tmp_path), None, {"gradient_accumulation_steps": 2, **adam}, arguments, lora)
    (wanted,) = pool.run(1, train, replace(stock, evaluate=True))
    saved = stock.settings | {"save_strategy": "steps", "save_steps": 3}
    shared = replace(stock, layout=(2, 1), settings=saved, fsdp2="Qwen2DecoderLayer")
    for found in pool.run(2, train, replace(shared, evaluate=True)):
        assert largest_difference(found, wanted) < CLOSE
    for found in pool.run(2, train, replace(shared, resume=str(tmp_path / "checkpoint-3"))):
        assert largest_difference(found, without_evaluation(wanted)) < CLOSE


def run_example(rank: int, file: str, names: dict) -> torch.Tensor:
    with launched(rank):
        trainer = runpy.run_path(file, names)["trainer"]
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def test_the_example_of_the_page_trains_the_same_weights_in_all_processes(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    model = build("qwen2")
    model.save_pretrained(tmp_path)
    names = {"folder": str(tmp_path), "output": str(tmp_path / "out"), "dataset": TEXTS}
    first, second = pool.run(2, run_example, str(tmp_path / "example.py"), names)
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.cat([weight.detach().flatten() for weight in model.parameters()]))


SETTINGS = [
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 (it needs logits of all tokens; set 0.0)"),
    ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True (it replaces the model's forward"),
    ({"torch_compile": True}, "torch_compile=True"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True (one rank would try again"),
    ({"train_sampling_strategy": "batch_rebalance"}, "use random, sequential or group_by_length"),
    ({"optim": "adalomo"}, "optim=adalomo"),
    ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler=False"),
    ({"use_cpu": False}, "TrainingArguments of 1 processes where enable_mm_sp was given a group of 2"),
]
ARGUMENTS = [
    ({"compute_loss_func": max}, "compute_loss_func (MM-SP computes the loss of the model in pieces"),
    ({"compute_metrics": max}, "compute_metrics (it needs logits"),
    ({"preprocess_logits_for_metrics": max}, "preprocess_logits_for_metrics"),
    ({"model_init": build, "model": None}, "model_init (give the model on which enable_mm_sp was called)"),
]


def refused_settings(rank: int, folder: str) -> list[str]:
    """What a Trainer says to each of ``SETTINGS`` and ``ARGUMENTS``, and to models that cannot be trained."""
    said = []
    model = build("qwen2")
    mm_sp = enable_mm_sp(model, ulysses=2)
    adapted = [LoraConfig(target_modules=["lm_head"]), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")]
    cases: list[tuple] = [(settings, {}) for settings, _ in SETTINGS] + [({}, given) for given, _ in ARGUMENTS]
    cases += [({}, {"model": build("qwen2")})] + [({}, {"model": config}) for config in adapted]
    for settings, given in cases:
        if not isinstance(given.get("model"), torch.nn.Module | None):
            given = {"model": get_peft_model(model, given["model"])}
        with launched(rank):
            try:
                args = TrainingArguments(folder, **{"use_cpu": True, "report_to": "none"} | settings)
                SharedTrainer(**{"model": model, "args": args, "train_dataset": TEXTS} | given)
                said.append("")
            except ValueError as error:
                said.append(str(error))
    assert model.mm_sp is mm_sp
    return said


def refused_preferences(rank: int, folder: str) -> list[str]:
    said = []
    enable_mm_sp(model := build("qwen2"), ulysses=2)
    enable_mm_sp(other := build("qwen2"), ring=2)
    for given in ({}, {"ref_model": other}, {"ref_model": build("llama")}, {"settings": {"precompute_ref_log_probs": True}}):
        with launched(rank):
            settings = {"use_cpu": True, "report_to": "none"} | given.pop("settings", {})
            try:
                SharedDPOTrainer(model, args=DPOConfig(folder, **settings), train_dataset=Dataset.from_list(PAIRS), **given)
            except ValueError as error:
                said.append(str(error))
    return said


def test_a_reference_model_that_is_missing_or_shared_otherwise_is_refused(tmp_path):
    for missing, otherwise, stock, precomputed in pool.run(2, refused_preferences, str(tmp_path)):
        assert "no ref_model (load it and call enable_mm_sp on it too, or give a peft_config)" in missing
        assert "a ref_model with other ulysses and ring" in otherwise
        assert "MM-SP is not on in this LlamaForCausalLM" in stock
        assert "precompute_ref_log_probs=True (give the reference model" in precomputed


def test_what_would_train_wrong_is_refused_by_name_before_any_exchange(tmp_path):
    wanted = [message for _, message in SETTINGS + ARGUMENTS]
    wanted += ["MM-SP is not on in this Qwen2ForCausalLM; load the model, call enable_mm_sp"]
    wanted += ["leave lm_head out of target_modules", "PromptTuningConfig (its virtual tokens"]
    for said in pool.run(2, refused_settings, str(tmp_path)):
        for message, found in zip(wanted, said, strict=True):
            assert message in found

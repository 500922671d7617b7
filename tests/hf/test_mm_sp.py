"""Turning MM-SP on and off under stock Transformers models, and what it refuses."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import DynamicCache, GemmaConfig, GemmaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_vila.hf.mm_sp.checks import check_model
from megatron_vila.hf.mm_sp.data import ShardCollator
from megatron_vila.hf.mm_sp.enable import enable_mm_sp
from megatron_vila.hf.mm_sp.language_attention import ATTENTION
from megatron_vila.plan.grid import GridShape
from tests.hf.mm_sp_cases import build, in_float64, text_sample, truth, video_sample
from tests.hf.mm_sp_ranks import Case, shard, train
from tests.ranks import pool

PAGE = Path(__file__).parents[2] / "docs/mm_sp_for_transformers.md"
SAMPLES = [text_sample(1, 13), text_sample(2, 7)]


def test_it_needs_no_megatron_core():
    code = "import sys; sys.modules['megatron'] = None; from megatron_vila.hf.mm_sp import enable_mm_sp"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def local_logits(rank: int, name: str, samples: list[dict]) -> float:
    model = in_float64(build(name)).eval()
    whole = [model(input_ids=sample["input_ids"][None]).logits[0] for sample in samples]
    mm_sp = enable_mm_sp(model, ulysses=2, ring=1)
    batch = mm_sp.collator()([{"input_ids": sample["input_ids"]} for sample in samples])
    logits = model(**batch).logits[0]
    row = batch["mm_sp_row"]
    errors = []
    for slot, place in enumerate(row.positions):
        document = int((row.cu_seqlens <= place).sum()) - 1
        token = place - row.cu_seqlens[document]
        if token < len(whole[document]):
            errors.append((logits[slot] - whole[document][token]).abs().max().item())
    return max(errors)


def test_without_labels_each_rank_gets_the_logits_of_its_tokens():
    assert max(pool.run(2, local_logits, "qwen2", SAMPLES)) < 1e-12


def generate_and_train(rank: int, name: str, folder: str) -> tuple[list, list, list, float]:
    model = build(name).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **settings)
    mm_sp = enable_mm_sp(model, ulysses=2)
    batch = mm_sp.collator()(SAMPLES)
    first = model(**batch).loss.item()
    while_on = model.generate(prompt, **settings)
    with mm_sp.paused():
        during = model.generate(prompt, **settings)
        if rank == 0:
            model.save_pretrained(folder)
    return before.tolist(), while_on.tolist(), during.tolist(), abs(model(**batch).loss.item() - first)


def test_generate_works_while_on_and_while_paused(tmp_path):
    for before, while_on, during, change in pool.run(2, generate_and_train, "qwen2", str(tmp_path)):
        assert while_on == during == before
        assert change == 0
    assert Qwen2ForCausalLM.from_pretrained(tmp_path).config._attn_implementation != ATTENTION


def enable_and_disable(rank: int, name: str) -> dict:
    model = build(name)
    ids = SAMPLES[0]["input_ids"][None]
    attributes = set(vars(model)), set(vars(model.lm_head)), list(model.state_dict())
    before = model(input_ids=ids, labels=ids)
    attention = model.config.get_text_config()._attn_implementation
    mm_sp = enable_mm_sp(model, ulysses=1, ring=2)
    names = list(model.state_dict())
    mm_sp.disable()
    mm_sp.disable()
    after = model(input_ids=ids, labels=ids)
    return {
        "same": torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss),
        "names": names == attributes[2],
        "attributes": (set(vars(model)), set(vars(model.lm_head))) == attributes[:2],
        "attention": model.config.get_text_config()._attn_implementation == attention,
        "hooks": not model._forward_pre_hooks and not model._forward_hooks and not model.model._forward_pre_hooks,
    }


@pytest.mark.parametrize("name", ["llama", "llava_onevision"])
def test_disable_gives_the_model_back_as_it_was(name):
    for found in pool.run(2, enable_and_disable, name):
        assert all(found.values()), found


def refused_call(rank: int, extra: dict) -> str:
    model = build("qwen2")
    mm_sp = enable_mm_sp(model, ulysses=1)
    batch = mm_sp.collator()(SAMPLES)
    if "past_key_values" in extra:
        extra = {"past_key_values": DynamicCache(config=model.config)}
    try:
        if "positional" in extra:
            model(batch.pop("input_ids"), **batch)
        elif "cached" in extra:
            model(input_ids=batch["input_ids"], past_key_values=mm_sp.cache())
        elif "backbone" in extra:
            model.model(input_ids=batch["input_ids"], attention_mask=torch.ones_like(batch["input_ids"]))
        elif "backbone_alone" in extra:
            model.model(input_ids=batch["input_ids"])
        elif "paused" in extra:
            with mm_sp.paused():
                with mm_sp.paused():
                    pass
                model(**batch)
        elif "attention" in extra:
            model.set_attn_implementation("sdpa")
            try:
                model(**batch)
            finally:
                model.set_attn_implementation(ATTENTION)
        elif "resize" in extra:
            layer = model.lm_head
            model.lm_head = nn.Linear(layer.in_features, layer.out_features, bias=False)
            try:
                model(**batch)
            finally:
                model.lm_head = layer
        elif "layout" in extra:
            model(**ShardCollator(GridShape(ring=2), 1, None)(SAMPLES))
        elif "count" in extra:
            mm_sp.count_supervised([{"input_ids": batch["input_ids"]}])
        else:
            model(**batch | extra)
    except ValueError as error:
        # A refused call leaves nothing behind.
        assert model(**mm_sp.collator()(SAMPLES)).loss > 0
        return str(error)
    return ""


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"attention_mask": torch.ones(1, 20)}, "attention_mask (the collator takes padding out"),
        ({"past_key_values": True}, "past_key_values (call model.generate"),
        ({"use_cache": True}, "use_cache (call model.generate"),
        ({"cached": True}, "takes one token and nothing to learn, not input_ids of shape (1, 22)"),
        ({"inputs_embeds": torch.zeros(1, 20, 16)}, "inputs_embeds (give input_ids)"),
        ({"logits_to_keep": 1}, "logits_to_keep"),
        ({"output_attentions": True}, "output_attentions (no attention weights are formed"),
        ({"return_dict": False}, "return_dict"),
        ({"mm_sp_row": None}, "this call has no mm_sp_row"),
        ({"positional": True}, "1 positional arguments: call model(**batch)"),
        ({"backbone": True}, "does not take attention_mask"),
        ({"backbone_alone": True}, "was called without mm_sp_row"),
        ({"paused": True}, "MM-SP is paused, and this batch of mm_sp.collator() holds only a share"),
        ({"resize": True}, "the output layer was replaced while MM-SP is on"),
        ({"count": True}, "this call has no mm_sp_row"),
        ({"layout": True}, "made for rank 1 of ulysses=1, ring=2, and the model runs as rank 0 of ulysses=1, ring=1"),
        ({"attention": True}, "attn_implementation=sdpa was set while MM-SP is on"),
    ],
)
def test_a_call_that_would_give_wrong_results_is_refused(extra, message):
    assert message in pool.run(1, refused_call, extra)[0]


def qwen2(**settings) -> Qwen2ForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, **settings))


@pytest.mark.parametrize(
    "settings, ulysses, message",
    [
        ({"attention_dropout": 0.1}, 1, "attention_dropout=0.1 is not supported; set attention_dropout=0.0"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, 1, "layer_types with chunked_attention are not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 1, "rope_type=dynamic"),
        ({}, 3, "ulysses=3 does not divide 4 query heads"),
    ],
)
def test_a_setting_that_would_give_wrong_gradients_is_refused_by_name(settings, ulysses, message):
    with pytest.raises(ValueError) as error:
        check_model(qwen2(**settings), ulysses, ATTENTION)
    assert message in str(error.value)


def test_all_settings_that_are_refused_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        check_model(qwen2(attention_dropout=0.1, layer_types=["chunked_attention"] * 2), 3, ATTENTION)
    for part in ("attention_dropout", "layer_types", "ulysses=3"):
        assert part in str(error.value)


ROTARY = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "attn_logit_softcapping": ("gemma2", {"attn_logit_softcapping": 30.0}),
    "attention_dropout": ("qwen3_vl", {"attention_dropout": 0.1}),
    "rope_type": ("qwen2_5_vl", {"rope_parameters": ROTARY | {"mrope_section": [1, 1, 1]}}),
    "output_router_logits": ("qwen3_vl_moe", {"output_router_logits": True}),
    "is_causal=False": ("qwen2_vl", {"is_causal": False}),
    "use_bidirectional_attention": ("gemma3", {"use_bidirectional_attention": True}),
    "layer_types": ("mistral", {"layer_types": ["chunked_attention"] * 2}),
    "ulysses": ("qwen2_vl", {}),
}
"""The settings of the table on the page, each with a model that has it."""


def test_all_settings_of_the_table_on_the_page_are_refused_and_no_other_is_tested():
    table = PAGE.read_text().split("| setting | why | cure |")[1].split("\n\n")[0]
    settings = [name for line in table.splitlines()[2:] for name in re.findall("`(.*?)`", line.split("|")[1])]
    values = ("dynamic", "longrope")  # of rope_type
    assert [name for name in settings if name not in values] == list(REFUSED)
    for name, (model, given) in REFUSED.items():
        with pytest.raises(ValueError, match=f"MM-SP cannot run this .*{name}"):
            check_model(build(model, **given), 3, ATTENTION)


def test_a_model_without_output_layer_is_refused():
    with pytest.raises(ValueError, match="Qwen2Model has no output layer"):
        check_model(qwen2().model, 1, ATTENTION)


def test_a_model_type_that_was_not_checked_is_refused():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    model = GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="model_type=gemma has not been checked with MM-SP; use llama, qwen2"):
        check_model(model, 1, ATTENTION)


def test_without_a_process_group_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match="start with torchrun"):
        enable_mm_sp(qwen2())


def test_a_model_that_is_wrapped_already_is_refused_with_the_cure():
    assert "with the model inside (model.module of DistributedDataParallel)" in pool.run(1, enable_wrapped)[0]


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"input_ids": [1, 9999], "labels": [1, 2]}, "sample 0 has 9999 in input_ids but the model has"),
        ({"input_ids": [1, -5]}, "use the model's own tokenizer"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "sample 0 has -1 in labels but the model has"),
        ({"input_ids": [1, 2], "labels": [1, 9999]}, "labels are token ids, or -100"),
    ],
)
def test_ids_and_labels_that_are_no_tokens_of_the_model_are_refused_on_all_ranks(sample, message):
    for found in pool.run(2, refused_sample, sample):
        assert message in found


def refused_sample(rank: int, sample: dict) -> str:
    mm_sp = enable_mm_sp(build("qwen2"), ulysses=2)
    with pytest.raises(ValueError) as error:
        mm_sp.collator()([sample])
    return str(error.value)


def enable_wrapped(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        enable_mm_sp(nn.parallel.DistributedDataParallel(build("qwen2")))
    return str(error.value)


def refused_enable(rank: int, settings: dict | list[dict], twice: bool, run: bool) -> str:
    model = build("qwen2")
    settings = settings if isinstance(settings, dict) else settings[rank]
    try:
        mm_sp = enable_mm_sp(model, **settings)
        if twice:
            enable_mm_sp(model)
        if run:
            model(**mm_sp.collator()(SAMPLES))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "settings, twice, run, message",
    [
        ({"ulysses": 4}, False, False, "ulysses=4 times ring=1 does not divide the 2 ranks of group"),
        ({"ring": 0}, False, False, "ulysses=1 times ring=0 does not divide"),
        ({"ulysses": "2"}, False, False, "ulysses='2' and ring=1 are not both whole numbers"),
        ({"kernel": "fast"}, False, False, "kernel=fast is not a kernel"),
        ({"kernel": "fa4"}, False, True, "kernel=fa4 cannot run here"),
        ({"frame_micro_batch": 0}, False, False, "frame_micro_batch=0 encodes nothing"),
        ({"ulysses": 2}, True, False, "MM-SP is on already"),
        ([{"ulysses": 2}, {"ring": 2}], False, False, "rank 0 has ulysses=2 and ring=1, rank 1 has ulysses=1 and ring=2"),
    ],
)
def test_sizes_and_kernels_that_cannot_work_are_refused_on_every_rank(settings, twice, run, message):
    for found in pool.run(2, refused_enable, settings, twice, run):
        assert message in found


def test_another_kernel_can_be_asked_for():
    loss, grads = truth(in_float64(build("llama")), SAMPLES)
    case = Case("llama", 2, 1, [[SAMPLES]], double=True, kernel="reference")
    for found in pool.run(2, train, case, loss, grads):
        assert max(found.values()) < 1e-12


def in_two_groups(rank: int, samples: list[dict]) -> tuple[float, int, int]:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = in_float64(build("llama"))
    mm_sp = enable_mm_sp(model, ulysses=2, group=halves[rank // 2])
    loss = model(**mm_sp.collator()(samples[rank // 2 :][:1])).loss
    return loss.item(), mm_sp.dp_rank, mm_sp.dp_size


def test_a_group_of_its_own_trains_apart_from_the_other_processes():
    results = pool.run(4, in_two_groups, SAMPLES)
    wanted = [truth(in_float64(build("llama")), [sample])[0] for sample in SAMPLES]
    for rank, (loss, *place) in enumerate(results):
        assert loss == pytest.approx(wanted[rank // 2], rel=1e-12)
        assert place == [0, 1]


def places(rank: int) -> tuple[int, int, int, int]:
    mm_sp = enable_mm_sp(build("llama"), ulysses=2)
    return mm_sp.dp_rank, mm_sp.dp_size, mm_sp.groups.sample.rank(), mm_sp.groups.grid.cp


def test_consecutive_ranks_share_samples_and_the_others_are_replicas():
    assert pool.run(4, places) == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]


def in_bfloat16(rank: int, samples: list[dict]) -> tuple[float, bool]:
    model = build("llava_onevision")
    shard(model, policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    # After fully_shard as well as before it.
    mm_sp = enable_mm_sp(model, ring=2)
    loss = model(**mm_sp.collator()(samples)).loss
    loss.backward()
    return loss.item(), all(p.grad.full_tensor().isfinite().all() for p in model.parameters() if p.grad is not None)


def test_fsdp2_may_compute_in_bfloat16():
    samples = [video_sample(1, [-5, 3, -7])]
    wanted, _ = truth(build("llava_onevision"), samples)
    for loss, is_finite in pool.run(2, in_bfloat16, samples):
        assert loss == pytest.approx(wanted, rel=0.05)
        assert is_finite


def run_examples(rank: int, files: list[str], folder: str, prompts: list[torch.Tensor]) -> tuple[float, list[int], list[int]]:
    training, generating = (
        runpy.run_path(file, {"folder": folder, "dataset": SAMPLES * 4, "prompts": prompts}) for file in files
    )
    stock = build("qwen2").eval().generate(prompts[-1], max_new_tokens=64)
    return training["loss"].item(), generating["answer"].tolist(), stock.tolist()


def test_the_examples_of_the_page_train_and_generate(tmp_path):
    codes = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert all(len(code.splitlines()) <= 18 for code in codes)
    build("qwen2").save_pretrained(tmp_path)
    files = [tmp_path / f"example_{number}.py" for number in range(len(codes))]
    for file, code in zip(files, codes, strict=True):
        file.write_text(code)
    prompts = [torch.tensor([[5, 6, 7, 8, 9, *question]]) for question in ([3], [4, 2])]
    (loss, answer, stock), other = pool.run(2, run_examples, [str(file) for file in files], str(tmp_path), prompts)
    assert loss == other[0] > 0
    assert answer == other[1] == stock

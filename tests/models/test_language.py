"""The language model against Hugging Face's Llama and Qwen2, and its weights as a function of seed and name alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_vila.config.schema import Config, LanguageConfig, ParallelConfig
from megatron_vila.models.initialize import global_name, tensor_parallel_slice
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.plan.row import pack
from megatron_vila.plan.sizes import padded_vocab_size
from tests import samples
from tests.parallel import contract
from tests.ranks import pool

DOCUMENT = samples.document("text", "t" * 30)


def _huggingface(llm: LanguageConfig):
    shape = {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "head_dim": llm.head_dim,
        "rms_norm_eps": llm.norm_eps,
        "rope_parameters": {"rope_type": "linear", "rope_theta": llm.rope_theta, "factor": llm.rope_scaling_factor},
        "tie_word_embeddings": llm.tie_embeddings,
        "max_position_embeddings": llm.max_positions,
        "attn_implementation": "eager",
    }
    if llm.qkv_bias:
        return Qwen2ForCausalLM(Qwen2Config(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape))


def _copy_weights(model, other, llm: LanguageConfig) -> None:
    """From Megatron's names to Hugging Face's."""
    ours = {name.removeprefix("llm."): p.detach().float() for name, p in model.named_parameters() if name.startswith("llm.")}
    group = llm.num_heads // llm.num_kv_heads
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][: llm.vocab_size],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    if not llm.tie_embeddings:
        theirs["lm_head.weight"] = ours["output_layer.weight"][: llm.vocab_size]
    for layer in range(llm.num_layers):
        w = {n.split(f"layers.{layer}.")[1]: t for n, t in ours.items() if f"layers.{layer}." in n}
        to = f"model.layers.{layer}."
        for kind in ("weight", "bias") if llm.qkv_bias else ("weight",):
            qkv = w[f"self_attention.linear_qkv.{kind}"]
            grouped = qkv.view(llm.num_kv_heads, group + 2, llm.head_dim, *qkv.shape[1:])
            for name, part in (("q", grouped[:, :group]), ("k", grouped[:, group]), ("v", grouped[:, group + 1])):
                theirs[f"{to}self_attn.{name}_proj.{kind}"] = part.reshape(-1, *qkv.shape[1:])
        theirs[to + "self_attn.o_proj.weight"] = w["self_attention.linear_proj.weight"]
        theirs[to + "mlp.gate_proj.weight"], theirs[to + "mlp.up_proj.weight"] = w["mlp.linear_fc1.weight"].chunk(2)
        theirs[to + "mlp.down_proj.weight"] = w["mlp.linear_fc2.weight"]
        theirs[to + "input_layernorm.weight"] = w["input_layernorm.weight"]
        theirs[to + "post_attention_layernorm.weight"] = w["pre_mlp_layernorm.weight"]
    missing, unexpected = other.load_state_dict(theirs, strict=False)
    assert not unexpected and all("inv_freq" in name or "lm_head" in name for name in missing)


def _losses(rank: int, config: Config) -> tuple[float, float]:
    topology, model, _ = contract.build(config, ParallelConfig())
    model.float()
    llm = config.model.llm
    other = _huggingface(llm).float()
    _copy_weights(model, other, llm)
    row = pack([DOCUMENT], 2, 2)
    shard = contract.shard_of(row, topology, llm, torch.float32)
    ours = model(shard, contract.made(model, samples.pixels([]).float())).loss_sum.item()
    logits = other(torch.from_numpy(DOCUMENT.token_ids)[None]).logits[0, :-1]
    theirs = torch.nn.functional.cross_entropy(logits, torch.from_numpy(DOCUMENT.labels)[:-1], reduction="sum").item()
    topology.destroy()
    return ours, theirs


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["llama", "qwen2"])
def test_the_loss_is_that_of_the_hugging_face_model_with_the_same_weights(bias, tied):
    [(ours, theirs)] = pool.run(1, _losses, samples.config(layers=2, bias=bias, tied=tied))
    assert ours == pytest.approx(theirs, rel=1e-5)


def _weights(rank: int, parallel: ParallelConfig, path) -> list[str]:
    """Names of this rank's parameters that are not the slices of the whole model's; one process writes the whole."""
    topology = ParallelTopology.create(parallel)
    model_parallel_cuda_manual_seed(1)
    model = VilaModel(samples.config(layers=2, tied=True), topology, torch.float32, torch.device("cpu"))
    grid, place = topology.grid, topology.place
    topology.destroy()
    if grid.world_size == 1:
        torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, path)
        return []
    whole = torch.load(path, weights_only=True)
    different = []
    for local, parameter in model.named_parameters():
        name = global_name(local, place.pp * 2 // grid.pp)
        full = whole["llm.embedding.word_embeddings.weight" if name == "llm.output_layer.weight" else name]
        if not torch.equal(parameter, tensor_parallel_slice(full, name, parameter, grid.tp, place.tp)):
            different.append(name)
    return different


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig(ulysses=2)], ids=str)
def test_initial_weights_are_bitwise_the_same_in_every_layout(parallel, tmp_path):
    pool.run(1, _weights, ParallelConfig(), tmp_path / "whole.pt")
    assert pool.run(2, _weights, parallel, tmp_path / "whole.pt") == [[], []]


def test_a_vocabulary_is_padded_alike_for_the_usual_tensor_parallel_sizes():
    assert {padded_vocab_size(151648, tp) for tp in (1, 2, 4, 8)} == {151680}
    assert padded_vocab_size(128257, 3) % 3 == 0


def _finer_than_bfloat16(rank: int, config: Config, parallel: ParallelConfig) -> set[str]:
    """Linear layers of which a bfloat16 model leaves a gradient in DDP's float32 buffer that bfloat16 cannot hold."""
    topology, model, _ = contract.build(config, parallel, torch.bfloat16)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    ddp.zero_grad_buffer()
    row = pack([DOCUMENT], topology.grid.document_multiple, topology.grid.row_multiple)
    llm = config.model.llm
    shard = contract.shard_of(row, topology, llm, torch.bfloat16)
    with ddp.no_sync():
        ddp(shard, contract.made(model, samples.pixels([]).bfloat16())).loss_sum.backward()
    topology.destroy()
    weights = {name: p.main_grad for name, p in model.named_parameters() if ".linear_" in name and name.endswith("weight")}
    assert all(grad.count_nonzero() > 0 for grad in weights.values())
    return {name.split(".")[-2] for name, grad in weights.items() if not torch.equal(grad, grad.bfloat16().float())}


@pytest.mark.parametrize("bias", [False, True], ids=["llama", "qwen2"])
def test_gradients_of_linear_layers_are_added_in_float32(bias):
    config = samples.config(layers=2, bias=bias)
    [found] = pool.run(1, _finer_than_bfloat16, config, ParallelConfig())
    assert found == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    # Under sequence parallelism Megatron's product stays where tokens have to be gathered for it.
    for found in pool.run(2, _finer_than_bfloat16, config, ParallelConfig(tp=2)):
        assert found == {"linear_proj", "linear_fc1", "linear_fc2"}


def parts_of_a_forward_pass(rank: int, config: Config) -> tuple[bool, float, float]:
    """Whether a whole row and its first half agree about the half's hidden states; the loss of a pass and of its two parts."""
    topology, model, _ = contract.build(config, ParallelConfig())
    text = samples.document("text", "t" * 12)
    half = dataclasses.replace(text, token_ids=text.token_ids[:6], labels=text.labels[:6])
    made_NH = contract.made(model, samples.pixels([]))
    shards = [contract.shard_of(pack([d], 2, 2), topology, config.model.llm, torch.float64) for d in (text, half)]
    whole_t1H, half_t1H = (model.hidden(shard, made_NH) for shard in shards)
    losses = model(shards[0], made_NH).loss_sum.item(), model.loss(whole_t1H, shards[0]).loss_sum.item()
    topology.destroy()
    return torch.allclose(whole_t1H[:6], half_t1H, rtol=1e-12, atol=1e-12), *losses


def test_hidden_states_come_without_a_loss_and_the_loss_is_made_of_them():
    ((agree, of_the_pass, of_its_parts),) = pool.run(1, parts_of_a_forward_pass, samples.config(layers=2))
    assert agree and of_the_pass == of_its_parts > 0

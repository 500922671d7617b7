"""One run of a Trainer in each process of a pool: stock in one process, or under MM-SP in several."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from megatron_vila.hf.mm_sp import enable_mm_sp
from megatron_vila.hf.mm_sp.trainer import MMSPTrainer
from tests.hf.mm_sp_cases import build


class SharedTrainer(MMSPTrainer, Trainer):
    pass


class ShardedTrainer(SharedTrainer):
    """Weights are sharded by accelerate's FSDP2, which it turns on by itself on GPUs only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state, layer = self.accelerator.state, self.args.fsdp_layer
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        for known in (PartialState._shared_state, state._shared_state):
            known["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


class SharedSFTTrainer(MMSPTrainer, SFTTrainer):
    pass


class SharedDPOTrainer(MMSPTrainer, DPOTrainer):
    pass


KINDS = {
    Trainer: (SharedTrainer, TrainingArguments),
    SFTTrainer: (SharedSFTTrainer, SFTConfig),
    DPOTrainer: (SharedDPOTrainer, DPOConfig),
}
"""For each stock Trainer the same one under MM-SP, and the class of its settings."""


def pad(samples: list[dict]) -> dict[str, torch.Tensor]:
    """A user's collator: rows of one length, padded on the right, and the pixels of all."""
    rows = [{key: torch.as_tensor(value) for key, value in sample.items() if key != "pixel_values_videos"} for sample in samples]
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key, empty in (("input_ids", 0), ("labels", -100), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        values = [row.get(key, torch.full_like(row["input_ids"], int(key == "attention_mask"))) for row in rows]
        batch[key] = torch.stack([nn.functional.pad(row, (0, longest - len(row)), value=empty) for row in values])
    for key in ("pixel_values", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        if any(key in row for row in rows):
            batch[key] = torch.cat([row[key] for row in rows if key in row])
    videos = [torch.as_tensor(video) for sample in samples for video in sample.get("pixel_values_videos", ())]
    if videos:
        batch["pixel_values_videos"] = torch.stack(videos)  # of patches, or of videos
    if not any("mm_token_type_ids" in row for row in rows):
        del batch["mm_token_type_ids"]
    return batch


@dataclass(frozen=True)
class Run:
    """A model, its samples and the settings of its Trainer. ``layout`` is ulysses and ring, None for the stock Trainer.
    ``resume`` is a checkpoint to go on from."""

    kind: type
    name: str
    train: Any
    out: str
    layout: tuple[int, int] | None = None
    settings: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    lora: bool = False
    evaluate: bool = False
    resume: str | None = None
    fsdp2: str | None = None

METRICS = ("entropy", "mean_token_accuracy", "num_tokens", "rewards/margins", "logits/chosen")
"""What TRL logs of each step beside the loss."""


@contextmanager
def launched(rank: int) -> Iterator[None]:
    """The environment that torchrun gives a process, and accelerate without a memory of earlier runs."""
    size = dist.get_world_size()
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    before = dict(os.environ)
    gc.freeze()  # accelerate collects garbage again and again, and looks through all that was imported
    if size > 1:
        os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def with_lora(model: nn.Module) -> nn.Module:
    """The model with adapters on the queries and the gates of its language model, none of them zero."""
    torch.manual_seed(3)
    layers = r".*layers\.\d+\.(self_attn\.q_proj|mlp\.gate_proj)"
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=layers))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def train(rank: int, run: Run) -> dict:
    """Losses and gradient norms of all steps, the weights at the end, the metrics of the evaluation."""
    with launched(rank):
        settings = {"report_to": "none", "disable_tqdm": True, "log_level": "error", "logging_steps": 1}
        settings |= {"save_strategy": "no", "use_cpu": True, "learning_rate": 0.3, "max_steps": 5}
        settings |= {"per_device_train_batch_size": 2, "optim": "sgd", "bf16": False}
        shared, configuration = KINDS[run.kind]
        args = configuration(run.out, **settings | run.settings)
        if run.fsdp2:
            shared, args.fsdp_layer = ShardedTrainer, run.fsdp2
        model = build(run.name)
        if run.lora:
            model = with_lora(model)
        if run.layout:
            enable_mm_sp(model, *run.layout)
        arguments = dict(run.arguments)
        if "ref_model" in arguments:
            arguments["ref_model"] = reference = build(arguments["ref_model"], tied=True)
            if run.layout:
                enable_mm_sp(reference, *run.layout)
        trainer = (shared if run.layout else run.kind)(model, args=args, train_dataset=run.train, **arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=run.resume)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": torch.tensor([entry["loss"] for entry in logged], dtype=torch.float64),
            "norms": torch.tensor([entry["grad_norm"] for entry in logged], dtype=torch.float64),
            "weights": {name: whole(weight) for name, weight in trainer.model.named_parameters()},
            "metrics": torch.tensor([[entry.get(name, 0) for name in METRICS] for entry in logged], dtype=torch.float64),
            "evaluation": trainer.evaluate() if run.evaluate else {},
            "tokens": trainer.state.num_input_tokens_seen,
        }


def whole(weight: torch.Tensor) -> torch.Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def largest_difference(found: dict, wanted: dict) -> float:
    """The largest difference of losses, gradient norms, weights and evaluation loss of two runs, relative to values over 1."""
    pairs = [(found[key], wanted[key]) for key in ("losses", "norms", "metrics")]
    assert list(found["weights"]) == list(wanted["weights"])
    pairs += [(weight, wanted["weights"][name]) for name, weight in found["weights"].items()]
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        if name in wanted["evaluation"]:
            pairs.append((torch.tensor(found["evaluation"][name]), torch.tensor(wanted["evaluation"][name])))
    assert all(one.shape == other.shape for one, other in pairs)
    return max(((one - other).abs() / other.abs().clamp(min=1)).max().item() for one, other in pairs)

"""The run: order of samples, loss, torch's AdamW, clipping, schedule, metrics and FLOPs by formula, evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.training.independent.model import TOWER, Vila
from tests.training.independent.samples import NOT_LEARNED, TOKENS_OF_A_FRAME, Sample

PARTS = ("vision", "projector", "llm")


@dataclass(frozen=True)
class Recipe:
    """Settings of a run, none of them anybody's default."""

    steps: int = 5
    rows: int = 2
    seed: int = 29
    lr: float = 0.011
    rates: dict[str, float] = field(default_factory=lambda: {"vision": 0.004, "projector": 0.017})
    frozen: tuple[str, ...] = ()
    min_lr: float = 0.003
    schedule: str = "cosine"
    warmup: int = 2
    weight_decay: float = 0.21
    beta1: float = 0.83
    beta2: float = 0.94
    eps: float = 0.006
    clip: float = 0.7

    def peak(self, part: str) -> float:
        return self.rates.get(part, self.lr)

    def rate(self, part: str, step: int) -> float:
        """Of step 1, 2, ...: from zero up to the peak, then down to ``min_lr`` as half a cosine, or level."""
        done, peak = step - 1, self.peak(part)
        if done <= self.warmup and self.warmup:
            return peak * done / self.warmup
        if self.schedule == "constant":
            return peak
        least = min(self.min_lr, peak)
        share = (done - self.warmup) / (self.steps - self.warmup)
        return least + (peak - least) * (1 + math.cos(math.pi * share)) / 2


class Run:
    """A run of ``model``; ``row(g)`` are the samples of row g. ``step()`` returns what a line of metrics.jsonl must say."""

    def __init__(self, model: Vila, recipe: Recipe, row: Callable[[int], Sequence[Sample]]) -> None:
        self.model, self.recipe, self.row = model, recipe, row
        self.done, self.skipped = 0, 0
        model.vision_tower.requires_grad_(False)
        states = TOWER["num_hidden_layers"] + 1
        self.tower_layers = model.shape.select_layer % states
        for part in PARTS:
            modules = [model.part(part)]
            if part == "vision":
                # What comes after the chosen hidden state is carried along, never trained.
                modules = [model.vision_tower.embeddings, *model.vision_tower.encoder.layers[: self.tower_layers]]
            for module in modules:
                module.requires_grad_(part not in recipe.frozen)
        groups = []
        for part in PARTS:
            learns = [p for p in model.part(part).parameters() if p.requires_grad]
            for decayed in (True, False):
                # Norms and biases are vectors.
                members = [p for p in learns if (p.dim() > 1) == decayed]
                decay = recipe.weight_decay if decayed else 0.0
                groups.append({"params": members, "weight_decay": decay, "part": part})
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(recipe.beta1, recipe.beta2), eps=recipe.eps
        )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self) -> dict[str, Any]:
        recipe, self.done = self.recipe, self.done + 1
        first = (self.done - 1) * recipe.rows
        samples = [sample for g in range(first, first + recipe.rows) for sample in self.row(g)]
        learned = sum(sample.learned for sample in samples)
        self.optimizer.zero_grad()
        loss = 0.0
        for sample in samples:
            total = loss_sum(self.model, sample) / max(learned, 1)
            loss += total.item()
            if total.requires_grad:
                total.backward()
        # A part that no sample of the step reached has a gradient of zeros, as in a run with several ranks.
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters()))
        rates = {part: recipe.rate(part, self.done) for part in PARTS if part not in recipe.frozen}
        if math.isfinite(loss) and math.isfinite(norm) and learned:
            if recipe.clip:
                nn.utils.clip_grad_norm_(self.parameters(), recipe.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = rates[group["part"]]
            self.optimizer.step()
        else:
            self.skipped += 1
        finite = math.isfinite(loss)
        return {
            "step": self.done,
            "loss": loss if finite else None,
            "grad_norm": norm if finite else None,
            **{f"lr_{part}": rate for part, rate in rates.items()},
            "tokens": sum(len(sample.ids) for sample in samples),
            "supervised_tokens": learned,
            "frames": sum(len(sample.pixels) for sample in samples),
            "model_flops": sum(flops(self, row) for row in (self.row(g) for g in range(first, first + recipe.rows))),
            "skipped": self.skipped,
        }


def loss_sum(model: Vila, sample: Sample) -> torch.Tensor:
    logits = model(torch.tensor(sample.ids), sample.pixels)
    return nn.functional.cross_entropy(logits, torch.tensor(sample.labels), ignore_index=NOT_LEARNED, reduction="sum")


def flops(run: Run, row: Sequence[Sample]) -> float:
    """Of the products of one row, forward and backward: 2 for a weight and token, 2 more for the gradient of the input and of
    the weight, each where it is needed; causal attention is half of the square; logits where something is learned.
    """
    model, recipe = run.model, run.recipe
    tower_learns, projector_learns, llm_learns = (part not in recipe.frozen for part in PARTS)
    frames = sum(len(sample.pixels) for sample in row)
    through = llm_learns or (frames > 0 and (tower_learns or projector_learns))
    llm = model.llm.config
    weights = sum(p.numel() for name, p in model.llm.model.layers.named_parameters() if p.dim() == 2)
    passes = 1 + through + llm_learns
    tokens = sum(len(sample.ids) for sample in row)
    total = 2 * passes * weights * tokens
    total += 2 * passes * llm.vocab_size * llm.hidden_size * sum(sample.learned for sample in row)
    heads, dim = llm.num_attention_heads, getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    for sample in row:
        # Queries times keys and probabilities times values, twice more on the way back.
        both = 2 * (2 * heads * dim * len(sample.ids) ** 2)
        total += llm.num_hidden_layers * both / 2 * (3 if through else 1)
    return total + frames * _flops_of_a_frame(run, tower_learns, projector_learns)


def _flops_of_a_frame(run: Run, tower_learns: bool, projector_learns: bool) -> float:
    tower = run.model.vision_tower
    patches = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
    # The gradient of the pixels is wanted by nobody.
    total = 2 * patches * tower.embeddings.patch_embedding.weight.numel() * (1 + tower_learns)
    for layer in tower.encoder.layers[: run.tower_layers]:
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        total += (3 if tower_learns else 1) * (2 * patches * weights + 4 * patches**2 * TOWER["hidden_size"])
    linears = [p.numel() for p in run.model.mm_projector.parameters() if p.dim() == 2]
    for place, weights in enumerate(linears):
        input_gradient = tower_learns if place == 0 else tower_learns or projector_learns
        total += 2 * TOKENS_OF_A_FRAME * weights * (1 + input_gradient + projector_learns)
    return total


@torch.no_grad()
def evaluation(model: Vila, samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, float]:
    """Of held-out samples one by one: a sample is right if each learned token has the largest logit."""
    right = [
        all(logits[place].argmax() == label for place, label in enumerate(sample.labels) if label != NOT_LEARNED)
        for sample in samples
        for logits in [model(torch.tensor(sample.ids), sample.pixels)]
    ]
    return {
        "eval_accuracy": sum(right) / len(samples),
        "eval_chance": max(Counter(answers).values()) / len(answers),
        "eval_loss": sum(loss_sum(model, s).item() for s in samples) / sum(s.learned for s in samples),
        "eval_samples": len(samples),
    }

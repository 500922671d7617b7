"""A small VILA with its optimizer on any layout, and gradients that are a function of the weights and the step alone.

With such gradients every layout takes the same steps, so optimizer and checkpoint are tested without running the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vila import accelerator
from megatron_vila.config.schema import Config, ParallelConfig
from megatron_vila.models.vila import VilaModel
from megatron_vila.parallel.topology import ParallelTopology
from megatron_vila.training.optimizer import apply_step, build_optimizer, finalize_gradients, wrap_ddp
from tests import samples

Layout = tuple[int, int, int, int]


@dataclass
class Run:
    config: Config
    topology: ParallelTopology
    model: VilaModel
    ddp: DistributedDataParallel
    optimizer: DistributedOptimizer
    scheduler: OptimizerParamScheduler

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def backward(self, step: int) -> None:
        """A backward pass through DDP's hooks and the reduction that Megatron's schedule ends with."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        grid = self.topology.grid
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device())
        for name, parameter in self.trainable().items():
            # Megatron sums these over tp, and tied embeddings over the first and last stage.
            copies = grid.tp if getattr(parameter, "sequence_parallel", False) else 1
            is_table = name.endswith(("word_embeddings.weight", "output_layer.weight"))
            copies *= 2 if is_table and self.config.model.llm.tie_embeddings and grid.pp > 1 else 1
            gradient = torch.sin(parameter.detach().double() * 100 + step) / copies
            total = total + (gradient * parameter).sum()
        if total.requires_grad:
            total.backward()
        self.finalize(tokens=1)

    def finalize(self, tokens: int) -> None:
        count = torch.tensor(tokens, dtype=torch.int32, device=accelerator.device())
        finalize_gradients([self.ddp], count, pg_collection=self.topology.collection)

    def step(self, step: int) -> float:
        self.backward(step)
        updated, norm = apply_step(self.optimizer)
        assert updated
        self.scheduler.step(1)
        return norm

    def state(self) -> dict[str, Any]:
        """Copies of the weights and of this rank's part of Adam's state."""
        inner = self.optimizer.optimizer
        adam = [dict(inner.state[p]) for group in inner.param_groups for p in group["params"]]
        main = [p.detach() for group in inner.param_groups for p in group["params"]]
        return {
            "weights": {name: p.detach().clone() for name, p in self.model.named_parameters()},
            "main": [p.clone() for p in main],
            "adam": [{key: value.detach().clone() for key, value in state.items()} for state in adam],
            "lr": [group["lr"] for group in inner.param_groups],
        }


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def build(
    layout: Layout, dtype: torch.dtype = torch.float32, tied: bool = False, overlap: bool | None = None, **changes: Any
) -> Run:
    """``layout`` is (tp, pp, ulysses, ring); ``changes`` are dotted keys with ``__`` for the dot."""
    config = samples.config(layers=2, tied=tied)
    config.parallel = ParallelConfig(*layout)
    config.optim.lr, config.optim.vision.lr, config.optim.weight_decay = 1e-3, 1e-4, 0.1
    config.train.steps = 20
    for key, value in changes.items():
        *path, last = key.split("__")
        target = config
        for name in path:
            target = getattr(target, name)
        setattr(target, last, value)
    parallel_state.destroy_model_parallel()
    topology = ParallelTopology.create(config.parallel)
    model = VilaModel(config, topology, dtype, accelerator.device())
    ddp = wrap_ddp(model, config.optim, overlap)
    optimizer, scheduler = build_optimizer([ddp], config.optim, config.train, dtype)
    return Run(config, topology, model, ddp, optimizer, scheduler)

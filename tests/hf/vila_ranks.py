"""What each rank does in the tests of data-parallel training of a VILA for transformers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID

RATE = 0.5
WEIGHTS = {
    "ddp": (),
    "fsdp2, every layer": ("SiglipEncoderLayer", "Projector", "DecoderLayer"),
    "fsdp2, as transformers names the units": ("VilaVisionTower", "Projector", "DecoderLayer"),
}


def load(folder: str, frozen: bool) -> PreTrainedModel:
    """The model, all of which is asked to be trained, or only its language model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    model.requires_grad_(True)
    if frozen:
        model.model.vision_tower.requires_grad_(False)
        model.model.mm_projector.requires_grad_(False)
    return model


def batch(pictures: int, seed: int) -> dict[str, torch.Tensor]:
    """A sequence with this many pictures among its tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 380, (1, 9 + 5 * pictures), generator=draw)
    for number in range(pictures):
        ids[0, 2 + 5 * number : 6 + 5 * number] = IMAGE_TOKEN_ID
    made = {"input_ids": ids, "labels": ids.clone()}
    return made | ({"pixel_values": torch.rand(pictures, 3, 56, 56, generator=draw) * 2 - 1} if pictures else {})


def alone(folder: str, steps: list[list[int]], frozen: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and weights after them, of one process that takes the batches of all ranks."""
    model, losses = load(folder, frozen), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for number, pictures in enumerate(steps):
        loss = sum(model(**batch(count, 10 * number + rank)).loss / len(pictures) for rank, count in enumerate(pictures))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


def train(
    rank: int, folder: str, steps: list[list[int]], weights: str, frozen: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same over data-parallel ranks."""
    model = load(folder, frozen)
    if weights == "ddp":
        called = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in list(model.modules()):
            if type(module).__name__.endswith(WEIGHTS[weights]):
                fully_shard(module, mesh=mesh)
        called = fully_shard(model, mesh=mesh)
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE), []
    for number, pictures in enumerate(steps):
        loss = called(**batch(pictures[rank], 10 * number + rank)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    return losses, {name: tensor.detach().clone() for name, tensor in whole.items()}

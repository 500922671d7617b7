"""A prediction of the memory that a rank needs, before anything is started.

Weights, gradients, optimizer state (sharded over dp*cp by Megatron's distributed optimizer, less what ``optim.offload_fraction``
moves to the host), and what a step keeps and works in (``plan/activations.py``). ``SLACK_BYTES``, with the buffer in which
GPUs exchange heads, stands for what PyTorch's allocator does not hand out: the CUDA context, NCCL's buffers, fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vila.config.schema import Config
from megatron_vila.plan.activations import activations, peer_bytes, pictures_of_a_rank
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.hardware import Machine
from megatron_vila.plan.sizes import llm_layer_parameters, lora_layer_parameters, parameter_count

SLACK_BYTES = 2 * GIB
"""CUDA context, communication buffers and workspaces of a GPU rank."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    llm_activations: int
    vision_activations: int
    workspace: int
    slack: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def allocated(self) -> int:
        """What tensors take, as ``torch.cuda.max_memory_allocated`` counts."""
        return self.total - self.slack

    @property
    def parts(self) -> str:
        """Each part in GiB."""
        return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in vars(self).items())

    def __str__(self) -> str:
        return f"{self.total / GIB:.1f} GiB ({self.parts})"


def element_bytes(precision: str, on_gpu: bool) -> int:
    """Bytes of a weight or activation; ``auto`` is bf16 on a GPU and fp32 on a CPU."""
    return {"bf16": 2, "fp32": 4, "fp64": 8, "auto": 2 if on_gpu else 4}[precision]


def gradient_bytes(config: Config, element: int) -> int:
    """Bytes of the gradient of a weight of ``element`` bytes, as it is kept and summed over replicas."""
    return max(element, 4 if config.optim.grad_reduce_fp32 else element)


def estimate_memory(config: Config, world_size: int, device_bytes: int) -> MemoryEstimate:
    """The fullest pipeline stage's rank on GPUs of ``device_bytes``, from which the tower takes its share; 0: on a CPU.

    The layout must divide ``world_size`` (``validate`` checks it first).
    """
    layout, optim = Layout.of(config.parallel), config.optim
    cp, dp = layout.cp, world_size // layout.size
    element = element_bytes(config.train.precision, device_bytes > 0)
    held, trained = stage_parameters(config)
    grad_bytes = gradient_bytes(config, element)
    active = activations(config, dp, element, device_bytes)
    # 16-bit gradients are copied to float32 for the update, when no activation is left; with offload chunk by chunk.
    update = 0 if grad_bytes >= 4 or optim.offload_fraction else 4 * trained // (dp * cp)
    return MemoryEstimate(
        weights=held * element,
        gradients=trained * grad_bytes,
        optimizer=int(trained * _state_bytes(element) // (dp * cp) * (1 - optim.offload_fraction)),
        llm_activations=active.llm,
        vision_activations=active.vision,
        workspace=max(active.workspace, update - active.llm - active.vision),
        slack=SLACK_BYTES + peer_bytes(config, element) if device_bytes else 0,
    )


def state_on_host(config: Config, world_size: int, on_gpu: bool) -> int:
    """Bytes of host memory that ``optim.offload_fraction`` takes on a rank of the fullest stage."""
    parallel = config.parallel
    replicas = max(1, world_size // (parallel.tp * parallel.pp))
    _, trained = stage_parameters(config)
    state_bytes = _state_bytes(element_bytes(config.train.precision, on_gpu))
    return int(config.optim.offload_fraction * state_bytes * trained / replicas)


def describe_memory(config: Config, world_size: int, machine: Machine) -> str:
    """The estimate for the fullest rank beside what it has on ``machine``, as ``explain`` and a dry run print it."""
    estimate, ranks = estimate_memory(config, world_size, machine.gpu_bytes), ranks_of_a_node(config, world_size)
    where = "of this machine" if machine.is_here else "planned for; --gpu names another"
    text = (
        f"Memory of the fullest rank, estimated: {estimate.total / GIB:.1f} GiB on {machine.of_a_rank(ranks)} with "
        f"{machine.rank_bytes(ranks) / GIB:.1f} GiB ({where}): {estimate.parts}."
    )
    on_host = {
        "Offloading takes": config.memory.offload_gib + state_on_host(config, world_size, machine.gpu_bytes > 0) / GIB,
        "Decoded pictures take up to": pictures_on_host(config, world_size) / GIB,
    }
    told = (f" {what} {ranks * gib:.1f} GiB of the host memory of a node." for what, gib in on_host.items() if gib)
    return text + "".join(told)


def pictures_on_host(config: Config, world_size: int) -> int:
    """Most bytes of host memory that the decoded pictures of a rank take: of the rows of a step and of ``data.prefetch`` more, a
    byte for each color of a pixel, as far as data.host_memory_gib is set and allows it. The layout must divide ``world_size``."""
    parallel, (squares, _) = config.parallel, pictures_of_a_rank(config)
    replicas = world_size // (parallel.tp * parallel.pp * parallel.ulysses * parallel.ring)
    rows = config.train.global_batch_size // replicas + max(0, config.data.prefetch)
    most = rows * squares * 3 * config.model.vision.image_size**2
    budget = config.data.host_memory_gib
    return min(most, int(budget * GIB)) if budget else most


def ranks_of_a_node(config: Config, world_size: int) -> int:
    """Ranks on a node that is filled as far as the run goes."""
    return min(world_size, config.parallel.gpus_per_node)


def _state_bytes(element: int) -> int:
    """Per parameter: Adam's two moments, and float32 main weights where the weights have 16 bits."""
    return 2 * max(element, 4) + (4 if element == 2 else 0)


def stage_parameters(config: Config) -> tuple[int, int]:
    """Parameters held and trained by a rank of the fullest pipeline stage."""
    model, parallel, optim = config.model, config.parallel, config.optim
    counts = parameter_count(model)
    num_layers = model.llm.num_layers // parallel.pp
    layers = num_layers * llm_layer_parameters(model.llm) // parallel.tp
    table = model.llm.vocab_size * model.llm.hidden_size // parallel.tp
    # Tower and projector are replicated over tensor parallelism.
    pictures = counts["vision"] + counts["projector"]
    pictures_trained = counts["vision"] * optim.vision.trainable + counts["projector"] * optim.projector.trainable
    tables = 1 if model.llm.tie_embeddings or parallel.pp > 1 else 2
    first = layers + tables * table
    learns = first
    if model.lora.rank:
        learns = num_layers * lora_layer_parameters(model, parallel.tp)
        first += learns
        learns += table * ("embeddings" in model.lora.also_train)
        learns += (2 * num_layers + 1) * model.llm.hidden_size * ("norms" in model.lora.also_train)
    return pictures + first, pictures_trained + learns * optim.llm.trainable


def memory_cure(config: Config, estimate: MemoryEstimate) -> str:
    """The setting that shrinks the largest part of ``estimate``."""
    biggest = max(vars(estimate), key=lambda name: getattr(estimate, name))
    if biggest == "llm_activations":
        more = "raise parallel.ring or parallel.ulysses, or shorten train.seq_length"
        if config.memory.recompute == "none":
            return f"set memory.recompute=attention_output, {more}"
        return f"raise memory.offload_gib or memory.block_layers, {more}"
    if biggest == "vision_activations":
        more = "lower data.num_frames or raise parallel.ring"
        return more if config.model.vision.recompute else f"set model.vision.recompute=true, {more}"
    if biggest == "workspace":
        tile = "lower memory.mlp_tile, or shorten train.seq_length" if config.memory.mlp_tile else "set memory.mlp_tile=8192"
        return tile + ", or encode fewer frames at once (model.vision.frame_micro_batch)" * config.optim.vision.trainable
    if biggest == "optimizer":
        return "raise optim.offload_fraction, or start more ranks: the optimizer state is shared by all ranks of dp*cp"
    return "raise parallel.tp or parallel.pp"

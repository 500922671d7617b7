"""What one key alone cannot tell: whether a configuration fits together, and fits its world and its machine.

Rules on numbers alone: ``start_checks`` looks at files and at the machine at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from megatron_vila.config.schema import Config, OptimConfig, TrainConfig
from megatron_vila.config.text_rules import MEDIA_FORMATS, TEMPLATES
from megatron_vila.errors import ConfigError
from megatron_vila.plan.bounds import LARGEST_NUMBER, MOST_RANKS, size_problems, text_problems, value_of
from megatron_vila.plan.budgets import GIB
from megatron_vila.plan.grid import Layout
from megatron_vila.plan.hardware import Machine
from megatron_vila.plan.layouts import chunk_problems, layout_problems, nearest_divisors, world_problem
from megatron_vila.plan.memory import estimate_memory, memory_cure, ranks_of_a_node
from megatron_vila.plan.pictures import in_units, most_frames, pictures_of, places, tokens_each
from megatron_vila.plan.sizes import PROJECTOR_TYPES, head_dim

CHOICES = {
    "model.projector.type": PROJECTOR_TYPES,
    "model.projector.token_order": ("row_major", "legacy_column_major"),
    "model.attention": ("auto", "fa4", "cudnn", "flash2", "cpu", "reference"),
    "memory.recompute": ("none", "attention_output", "full"),
    "data.image_aspect": ("resize", "pad"),
    "data.fps_rule": ("spread", "first"),
    "data.media_format": MEDIA_FORMATS,
    "data.template": ("", *TEMPLATES),
    "data.over_long": ("truncate", "drop"),
    "data.bad_records": ("skip", "stop"),
    "data.video_decoder": ("auto", "cpu", "nvdec"),
    "optim.schedule": ("cosine", "constant"),
    "train.precision": ("auto", "bf16", "fp32", "fp64"),
    "train.on_nan": ("stop", "skip"),
    "checkpoint.resume": (True, False, "newest_whole"),
}
"""Keys with a fixed set of values."""

SMALLEST_CACHE_GIB = 0.25
"""Room for the pieces that the threads of a node read at once."""

AT_LEAST_ONE = {
    "model.vision": ("hidden_size", "num_layers", "num_heads", "ffn_hidden_size", "image_size", "patch_size"),
    "model.llm": (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "vocab_size",
        "max_positions",
    ),
    "parallel": ("tp", "pp", "ulysses", "ulysses_chunks", "ring", "gpus_per_node"),
    "memory": ("block_layers",),
    "data": ("num_frames", "prefetch"),
    "train": ("steps", "global_batch_size", "seq_length", "max_skips", "log_every"),
}

AT_LEAST_ZERO = {
    "model.vision": ("frame_micro_batch",),
    "model.lora": ("rank",),
    "memory": ("recompute_layers", "mlp_tile", "offload_gib"),
    "data": ("fps", "workers", "host_memory_gib"),
    "optim": ("min_lr", "warmup_steps", "warmup_fraction", "weight_decay", "clip_grad"),
    "train": ("seed", "eval_every"),
    "checkpoint": ("save_every", "keep"),
}

ABOVE_ZERO = {
    "model": ("init_std",),
    "model.lora": ("alpha",),
    "model.vision": ("layer_norm_eps",),
    "model.llm": ("norm_eps", "rope_theta", "rope_scaling_factor"),
    "optim": ("lr", "eps"),
    "train": ("timeout_minutes",),
}

LORA_NAMES = {"targets": ("qkv", "proj", "fc1", "fc2"), "also_train": ("embeddings", "norms")}
"""What the lists of ``model.lora`` may name, each once."""

BF16_ONLY_KERNELS = ("fa4", "cudnn", "flash2")


def validate(config: Config, world_size: int, machine: Machine | None = None) -> list[str]:
    """Check the numbers of ``config`` for ``world_size`` ranks; return warnings, about memory too where ``machine`` is given.

    Raises ``ConfigError`` that lists all problems at once, each with the setting, its value and the cure. Files and the machine
    at hand are looked at by ``start_checks``.
    """
    refuse(number_problems(config, world_size))
    return number_warnings(config, world_size, machine)


def refuse(problems: Sequence[str]) -> None:
    """Raise ``ConfigError`` that lists ``problems``, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"- {p}" for p in problems))


def number_problems(config: Config, world_size: int) -> list[str]:
    """Why ``config`` cannot run on ``world_size`` ranks: impossible values; without any, what does not fit together."""
    problems = [*value_problems(config)]
    if world_size > MOST_RANKS:
        problems.append(f"world size {world_size} must be a mistake; use at most {MOST_RANKS} ranks")
    # Everything below divides by these values, so wrong ones are reported first.
    if problems:
        return problems
    return [
        *shape_problems(config),
        *_layout_and_batch_problems(config, world_size),
        *blend_problems(config),
        *_optim_problems(config),
        *_lora_problems(config),
        *_policy_problems(config),
        *_profile_problems(config, world_size),
        *_saving_problems(config),
    ]


def number_warnings(config: Config, world_size: int, machine: Machine | None) -> list[str]:
    """What runs, but hardly as it is meant; ``config`` has no ``number_problems``."""
    found = [*_length_warnings(config), *_grid_warnings(config, world_size, machine)]
    if machine is not None:
        found += [*_node_warnings(config, world_size, machine), *_memory_warnings(config, world_size, machine)]
    return found


def value_problems(config: Config) -> Iterable[str]:
    """Values that are impossible whatever the others are; each line begins with its key."""
    yield from size_problems(config)
    yield from text_problems(config)
    for name, choices in CHOICES.items():
        if value_of(config, name) not in choices:
            known = (str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)
            yield f"{name}={value_of(config, name)} is not known; choose one of {', '.join(known)}"
    for bounds, text in ((AT_LEAST_ONE, "at least 1"), (AT_LEAST_ZERO, "at least 0"), (ABOVE_ZERO, "above 0")):
        for name in (f"{section}.{leaf}" for section, leaves in bounds.items() for leaf in leaves):
            value = value_of(config, name)
            too_small = {"at least 1": value < 1, "at least 0": value < 0, "above 0": value <= 0}[text]
            if too_small:
                yield f"{name}={value} must be {text}"
    for leaf, choices in LORA_NAMES.items():
        names = value_of(config, f"model.lora.{leaf}")
        if len(set(names)) < len(names) or not set(names) <= set(choices):
            yield f"model.lora.{leaf}=[{','.join(names)}] may name {', '.join(choices)}, each at most once"
    for name in ("optim.beta1", "optim.beta2"):
        if value_of(config, name) < 0 or value_of(config, name) >= 1:
            yield f"{name}={value_of(config, name)} must be at least 0 and below 1"
    if config.data.cache_gib < SMALLEST_CACHE_GIB:
        yield f"data.cache_gib={config.data.cache_gib} is too small; use {SMALLEST_CACHE_GIB} or more"
    if not 0 <= config.data.max_broken <= 1:
        yield f"data.max_broken={config.data.max_broken} is a share; use 0 (no sample may be broken) to 1 (any number may)"
    fraction = config.optim.offload_fraction
    if fraction < 0 or fraction > 1:
        yield f"optim.offload_fraction={fraction} is a share of the optimizer state; use 0 (none) to 1 (all of it)"
    for part in ("vision", "projector", "llm"):
        lr = value_of(config, f"optim.{part}.lr")
        if lr is not None and lr <= 0:
            yield f"optim.{part}.lr={lr} must be above 0; to freeze the part set optim.{part}.trainable=false"
    try:
        datetime.fromisoformat(config.data.template_clock)
    except ValueError:
        yield (
            f"data.template_clock={config.data.template_clock} is no date; write it as 2024-07-26, or with a time as "
            "2024-07-26T12:30"
        )
    if config.model.llm.head_dim is not None and config.model.llm.head_dim < 1:
        yield f"model.llm.head_dim={config.model.llm.head_dim} must be at least 1, or null for hidden_size / num_heads"


def shape_problems(config: Config) -> Iterable[str]:
    """Sizes of a model that do not fit each other; each line begins with its key. Values are possible ones."""
    vision, llm = config.model.vision, config.model.llm
    if vision.patch_size > vision.image_size:
        yield (
            f"model.vision.patch_size={vision.patch_size} is larger than model.vision.image_size={vision.image_size}, "
            f"so a picture has no patch; use a patch of at most {vision.image_size}"
        )
    if vision.hidden_size % vision.num_heads:
        yield (
            f"model.vision.num_heads={vision.num_heads} does not divide model.vision.hidden_size={vision.hidden_size}; "
            f"use {nearest_divisors(vision.hidden_size, vision.num_heads)} heads"
        )
    if not -vision.num_layers - 1 <= vision.select_layer <= vision.num_layers:
        yield (
            f"model.vision.select_layer={vision.select_layer} is outside the {vision.num_layers + 1} hidden states of "
            f"{vision.num_layers} layers; use {-vision.num_layers - 1} to {vision.num_layers} (-2: last layer but one)"
        )
    projector = config.model.projector
    if projector.token_order != "row_major" and projector.type != "mlp_downsample":
        yield (
            f"model.projector.token_order={projector.token_order} belongs to model.projector.type=mlp_downsample, not to "
            f"{projector.type}; set model.projector.token_order=row_major"
        )
    if llm.head_dim is None and llm.hidden_size % llm.num_heads:
        yield (
            f"model.llm.num_heads={llm.num_heads} does not divide model.llm.hidden_size={llm.hidden_size}; use "
            f"{nearest_divisors(llm.hidden_size, llm.num_heads)} heads or set model.llm.head_dim"
        )
    elif head_dim(llm) % 2:
        yield f"model.llm.head_dim={head_dim(llm)} is odd, but rotary embeddings turn pairs of channels; use an even size"
    if llm.num_heads % llm.num_kv_heads:
        yield (
            f"model.llm.num_kv_heads={llm.num_kv_heads} does not divide model.llm.num_heads={llm.num_heads}; use "
            f"{nearest_divisors(llm.num_heads, llm.num_kv_heads)} key/value heads"
        )
    for name in ("data.frame_separator_ids", "data.image_separator_ids"):
        bad = [i for i in value_of(config, name) if not 0 <= i < llm.vocab_size]
        if bad:
            yield f"{name} has the ids {bad} outside the embedding table; use 0 to model.llm.vocab_size-1 = {llm.vocab_size - 1}"


def _layout_and_batch_problems(config: Config, world_size: int) -> Iterable[str]:
    layout, llm = Layout.of(config.parallel), config.model.llm
    if not llm.num_heads % llm.num_kv_heads and (llm.head_dim or not llm.hidden_size % llm.num_heads):
        yield from layout_problems(llm, layout)
        yield from chunk_problems(llm, layout, config.parallel.ulysses_chunks)
    world = world_problem(llm, layout, world_size)
    if world:
        yield world
        return
    dp, batch = world_size // layout.size, config.train.global_batch_size
    if batch % dp:
        sizes = " or ".join(str(n) for n in (batch // dp * dp, batch // dp * dp + dp) if n > 0)
        yield (
            f"train.global_batch_size={batch} is not a multiple of the data-parallel size {dp} (world size {world_size} / "
            f"{layout.size} ranks of {layout}); use {sizes}"
        )


def warmup_steps(optim: OptimConfig, train: TrainConfig) -> int:
    """Steps over which learning rates rise."""
    return optim.warmup_steps or round(optim.warmup_fraction * train.steps)


def blend_problems(config: Config) -> Iterable[str]:
    """What is wrong with data.weights."""
    weights, entries = config.data.weights, len(config.data.train)
    if weights and len(weights) != entries:
        yield (
            f"data.weights={weights} has {len(weights)} numbers and data.train {entries} entries; give one weight for each "
            "entry, or none"
        )
    for weight in weights:
        if not 0 < weight <= LARGEST_NUMBER:
            yield (
                f"data.weights={weights}: {weight} is not the share of an entry; give a number above 0 and at most "
                f"{LARGEST_NUMBER:.0e}, and leave an entry that is not wanted out of data.train"
            )


def _optim_problems(config: Config) -> Iterable[str]:
    optim, train, attention = config.optim, config.train, config.model.attention
    if not (optim.vision.trainable or optim.projector.trainable or optim.llm.trainable):
        yield (
            "optim.vision.trainable, optim.projector.trainable and optim.llm.trainable are all false: there is nothing to "
            "train; set one of them to true"
        )
    if optim.warmup_fraction >= 1:
        yield f"optim.warmup_fraction={optim.warmup_fraction} must be below 1: it is a part of train.steps"
    elif warmup_steps(optim, train) >= train.steps:
        setting = "warmup_steps" if optim.warmup_steps else "warmup_fraction"
        cure = f"use at most {train.steps - 1}" if optim.warmup_steps else "lower it"
        yield f"optim.{setting}={getattr(optim, setting)} leaves no step after the warm-up of train.steps={train.steps}; {cure}"
    rates = {"optim.lr": optim.lr} | {
        f"optim.{name}.lr": part.lr
        for name, part in (("vision", optim.vision), ("projector", optim.projector), ("llm", optim.llm))
        if part.lr is not None and part.trainable
    }
    for name, rate in rates.items():
        if optim.schedule == "cosine" and optim.min_lr > rate:
            yield f"optim.min_lr={optim.min_lr} is above {name}={rate}, where the cosine starts; use at most {rate}"
        if rate * optim.weight_decay >= 1:
            yield (
                f"optim.weight_decay={optim.weight_decay} with {name}={rate} takes away each whole weight in one step; keep "
                "their product below 1 (usual: 0 to 0.1 for the decay)"
            )
    if attention in BF16_ONLY_KERNELS and train.precision in ("fp32", "fp64"):
        yield (
            f"model.attention={attention} computes in bf16 only, but train.precision={train.precision}; use "
            f"train.precision=bf16, or model.attention=auto"
        )


def _profile_problems(config: Config, world_size: int) -> Iterable[str]:
    for name, values, most in (
        ("steps", config.profile.steps, config.train.steps),
        ("ranks", config.profile.ranks, world_size - 1),
    ):
        first = 1 if name == "steps" else 0
        outside = [value for value in values if not first <= value <= most]
        if outside and (config.profile.steps or min(outside) < first):
            yield f"profile.{name}={values}: {outside} do not exist in this run; use {first} to {most}"


def _saving_problems(config: Config) -> Iterable[str]:
    if config.checkpoint.save_every and not config.checkpoint.save:
        yield (
            f"checkpoint.save_every={config.checkpoint.save_every}, but checkpoint.save=false: nothing would be saved; set "
            "checkpoint.save=true, or save_every=0 for a run that saves nothing"
        )


def _lora_problems(config: Config) -> Iterable[str]:
    lora = config.model.lora
    if lora.rank and not lora.targets:
        yield (
            f"model.lora.rank={lora.rank}, but model.lora.targets is empty: no layer gets an update; name some of "
            f"{', '.join(LORA_NAMES['targets'])}, or set rank=0"
        )
    if lora.rank and not config.optim.llm.trainable:
        yield (
            f"model.lora.rank={lora.rank} adds updates that optim.llm.trainable=false freezes; set optim.llm.trainable=true (the "
            "weights below the updates stay frozen) or rank=0"
        )
    if lora.also_train and not lora.rank:
        yield (
            f"model.lora.also_train=[{','.join(lora.also_train)}] is for weights beside LoRA's updates, but model.lora.rank=0: "
            "optim.llm.trainable decides for the whole language model; set a rank, e.g. 8, or also_train=[]"
        )


def _policy_problems(config: Config) -> Iterable[str]:
    memory = config.memory
    if memory.block_layers > 1 and memory.recompute != "attention_output":
        yield (
            f"memory.block_layers={memory.block_layers} rebuilds layers from kept attention outputs, but memory.recompute="
            f"{memory.recompute}; set memory.recompute=attention_output or block_layers=1"
        )
    layers = config.model.llm.num_layers // config.parallel.pp
    if memory.recompute_layers and (memory.recompute == "none" or memory.recompute_layers > layers):
        yield (
            f"memory.recompute_layers={memory.recompute_layers} with memory.recompute={memory.recompute} and {layers} layers of "
            "a stage; set memory.recompute=attention_output and no more layers than a stage has, or recompute_layers=0 for all"
        )
    if memory.offload_gib and memory.recompute == "none":
        yield (
            f"memory.offload_gib={memory.offload_gib:g} is for what a recompute policy keeps, but memory.recompute=none; set "
            "memory.recompute=attention_output or offload_gib=0"
        )


def _length_warnings(config: Config) -> Iterable[str]:
    seq, llm, data = config.train.seq_length, config.model.llm, config.data
    if seq > llm.max_positions and not data.packing:
        yield (
            f"train.seq_length={seq} exceeds model.llm.max_positions={llm.max_positions}: later positions are new to the "
            f"model; raise model.llm.rope_theta for them (stage 4 of the recipe) or shorten the rows"
        )
    pictures, separators = pictures_of(config.model), len(data.frame_separator_ids)
    units = pictures.units(data.num_frames, True)
    if (tokens := places(units, separators)) > seq:
        most = most_frames(pictures, seq, separators)
        fate = "are dropped" if data.over_long == "drop" else f"keep at most {most} frames, spread evenly"
        yield (
            f"data.num_frames={data.num_frames} {in_units(units)} of {tokens_each(units, separators)} tokens make {tokens} "
            f"tokens, more than train.seq_length={seq}: long videos {fate}"
        )


def _grid_warnings(config: Config, world_size: int, machine: Machine | None) -> Iterable[str]:
    parallel = config.parallel
    inner, ranks = parallel.tp * parallel.ulysses, parallel.gpus_per_node
    joined = machine.joined_ranks(ranks) if machine else ranks
    if world_size <= joined or joined % inner == 0:
        return
    where = f"inside nodes of parallel.gpus_per_node={ranks}"
    if machine and joined != ranks:
        where = f"among the {joined} ranks that NVLink joins on {machine.name}"
    yield (
        f"parallel.tp={parallel.tp} * parallel.ulysses={parallel.ulysses} = {inner} ranks do not lie {where}: their all-to-all "
        f"and all-gather cross the network; choose a product that divides {joined} and put the rest into parallel.ring"
    )


def _node_warnings(config: Config, world_size: int, machine: Machine) -> Iterable[str]:
    ranks, gpus = config.parallel.gpus_per_node, machine.gpus_per_node
    if gpus is not None and min(ranks, world_size) > gpus:
        yield (
            f"parallel.gpus_per_node={ranks}, but the nodes planned for ({machine.name}) have {gpus} GPUs; set "
            f"parallel.gpus_per_node={gpus}"
        )


def _memory_warnings(config: Config, world_size: int, machine: Machine) -> Iterable[str]:
    estimate, ranks = estimate_memory(config, world_size, machine.gpu_bytes), ranks_of_a_node(config, world_size)
    there = machine.rank_bytes(ranks)
    if estimate.total > there:
        yield (
            f"a rank needs about {estimate}, but {machine.of_a_rank(ranks)} has {there / GIB:.1f} GiB; "
            f"{memory_cure(config, estimate)}"
        )

"""What a Trainer under MM-SP refuses, each with its cure, before anything is exchanged."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "the Trainer of Transformers cannot be imported; it needs accelerate: pip install 'transformers[torch]'"
    ) from error

from megatron_vila.hf.mm_sp.enable import MMSP

TRL_TRAINERS = ("_BaseTrainer", "SFTTrainer", "DPOTrainer")
"""Classes of TRL whose loss is right under MM-SP."""

_NEEDS_LOGITS = "it needs logits, which no rank has; leave it out, and compute it with the saved model without MM-SP"

_CURE_OF_ARGUMENT = {
    "model_init": "give the model on which enable_mm_sp was called",
    "compute_loss_func": "MM-SP computes the loss of the model in pieces and returns no logits; leave it out",
    "compute_metrics": _NEEDS_LOGITS,
    "preprocess_logits_for_metrics": _NEEDS_LOGITS,
}
_CURE_OF_SETTING = {
    "label_smoothing_factor": "it needs logits of all tokens; set 0.0",
    "neftune_noise_alpha": "its noise would depend on each rank's share of a sample; leave it out",
    "use_liger_kernel": "it replaces the model's forward, and MM-SP computes output layer and loss in pieces itself; set False",
    "torch_compile": "exchanges between the ranks are not compiled; set False",
    "auto_find_batch_size": "one rank would try again while the others wait; set per_device_train_batch_size",
    "deepspeed": "weights are sharded by FSDP2; set fsdp=True with fsdp_config={'version': 2} instead",
    "predict_with_generate": "call model.generate yourself, with the same prompt on all ranks of a replica",
}


def find_mm_sp(model: Any) -> MMSP:
    """The object that ``enable_mm_sp`` returned for ``model`` or, under PEFT, for its base model. Raises ``ValueError``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mm_sp = getattr(base, "mm_sp", None)
    if not isinstance(mm_sp, MMSP):
        given = f"model={model!r}" if isinstance(model, str) else f"this {type(model).__name__}"
        raise ValueError(
            f"MM-SP is not on in {given}; load the model, call enable_mm_sp(model, ulysses=..., ring=...) and give the model to "
            "the Trainer"
        )
    return mm_sp


def check_class(cls: type, mixin: type, replaced: tuple[str, ...]) -> None:
    """Raise ``TypeError`` for a class whose base classes come in the wrong order, or whose loss MM-SP cannot compute.
    ``replaced`` are the methods of ``mixin`` that would hide those of a user's base class."""
    order = cls.__mro__
    if Trainer not in order:
        return
    if order.index(Trainer) < order.index(mixin) or any(
        issubclass(base, Trainer) for base in order[1 : order.index(mixin)] if not issubclass(base, mixin)
    ):
        raise TypeError(f"{cls.__name__}: name MMSPTrainer first, as in class {cls.__name__}(MMSPTrainer, Trainer)")
    for base in order[order.index(mixin) + 1 :]:
        package = base.__module__.partition(".")[0]
        if package == "trl" and base.__name__ not in TRL_TRAINERS:
            raise TypeError(
                f"{cls.__name__}: {base.__name__} of TRL generates or needs logits of whole samples, which no rank has; with "
                "MM-SP use SFTTrainer or DPOTrainer, or run it without MM-SP"
            )
        hidden = [name for name in replaced if name in vars(base)]
        if hidden and package not in ("trl", "transformers"):
            raise TypeError(
                f"{cls.__name__}: {base.__name__} has its own {', '.join(hidden)}, which MMSPTrainer would hide; define it in "
                "a class that derives from (MMSPTrainer, Trainer) and call super() there"
            )


def check_arguments(name: str, constructor: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[MMSP, Any]:
    """Check the arguments of the ``constructor`` of Trainer ``name``, and return the MM-SP of its model and its settings.

    Raises ``ValueError`` that lists everything refused. No collective."""
    given = inspect.signature(constructor).bind_partial(*args, **kwargs).arguments
    problems = [f"{name} ({cure})" for name, cure in _CURE_OF_ARGUMENT.items() if given.get(name) is not None]
    mm_sp = None
    if given.get("model_init") is None:
        mm_sp = find_mm_sp(given.get("model"))
    if getattr(given.get("peft_config"), "is_prompt_learning", False):
        problems.append(_prompt_learning(given["peft_config"]))
    if "ref_model" in inspect.signature(constructor).parameters:
        problems += _reference_problems(given, mm_sp)
    if given.get("args") is not None:
        problems += _setting_problems(given["args"], mm_sp)
    _refuse(name, problems)
    assert mm_sp is not None
    return mm_sp, given.get("args")


def _reference_problems(given: Mapping[str, Any], mm_sp: MMSP | None) -> list[str]:
    """What is wrong with the reference model of DPO."""
    reference, settings = given.get("ref_model"), given.get("args")
    problems = [
        f"{name}=True ({cure})"
        for name, cure in (
            (
                "precompute_ref_log_probs",
                "give the reference model, or a peft_config, whose base model is the reference",
            ),
            ("sync_ref_model", "the two models are shared in their own ways; leave it out"),
        )
        if getattr(settings, name, False)
    ]
    if given.get("data_collator") is not None:
        problems.append("data_collator (preferences are shared with TRL's own; leave it out)")
    if reference is not None:
        other = find_mm_sp(reference)
        if mm_sp is not None and other.groups.grid != mm_sp.groups.grid:
            problems.append("a ref_model with other ulysses and ring (call enable_mm_sp alike on both models)")
    elif given.get("peft_config") is None and not hasattr(given.get("model"), "peft_config"):
        problems.append("no ref_model (load it and call enable_mm_sp on it too, or give a peft_config)")
    return problems


def _setting_problems(settings: Any, mm_sp: MMSP | None) -> list[str]:
    problems = []
    for name, cure in _CURE_OF_SETTING.items():
        value = getattr(settings, name, None)
        if value not in (None, False, 0):
            problems.append(f"{name}={value} ({cure})")
    if settings.train_sampling_strategy == "batch_rebalance":
        problems.append(
            "train_sampling_strategy=batch_rebalance (it deals samples to all processes; use random, sequential or "
            "group_by_length)"
        )
    optimizer = getattr(settings.optim, "value", settings.optim)
    if any(word in optimizer for word in ("lomo", "layerwise")):
        problems.append(f"optim={optimizer} (it changes weights before their gradients are averaged; use adamw_torch)")
    loader = settings.accelerator_config
    if loader.dispatch_batches:
        problems.append("dispatch_batches=True (the first process would read the batches of all; leave it out)")
    if not loader.use_seedable_sampler:
        problems.append("use_seedable_sampler=False (ranks that share samples need the same order; leave it out)")
    if mm_sp is not None and mm_sp.dp_size > 1 and not loader.even_batches:
        problems.append("even_batches=False (replicas would wait for each other's batches; leave it out)")
    if mm_sp is not None and mm_sp.dp_size > 1 and not settings.average_tokens_across_devices:
        problems.append(
            "average_tokens_across_devices=False (the loss is the mean over the tokens of all ranks; set True)"
        )
    parallel = getattr(settings, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (getattr(parallel, name, 1) or 1) > 1:
            problems.append(
                f"parallelism_config.{name}={getattr(parallel, name)} (ulysses and ring share samples; leave it out)"
            )
    if mm_sp is not None and settings.world_size != mm_sp.groups.everyone.size():
        problems.append(
            f"TrainingArguments of {settings.world_size} processes where enable_mm_sp was given a group of "
            f"{mm_sp.groups.everyone.size()} (train all processes in one group and start with torchrun; on CPUs set use_cpu=True)"
        )
    return problems


def check_trainer(trainer: Any, mm_sp: MMSP) -> None:
    """Check what only a made Trainer knows: plugins of accelerate, and what PEFT did to the model. Raises ``ValueError``."""
    problems, state = [], trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        problems.append(f"DeepSpeed ({_CURE_OF_SETTING['deepspeed']})")
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        problems.append("FSDP version 1 (set fsdp_config={'version': 2})")
    if trainer.is_distributed_loading_by_transformers:
        problems.append("a model loaded with distributed_config (load it without, and shard it by fsdp=True)")
    if trainer.args.world_size != mm_sp.groups.everyone.size():
        problems.append(
            f"a Trainer of {trainer.args.world_size} processes for MM-SP over {mm_sp.groups.everyone.size()}"
        )
    if trainer.is_fsdp_enabled and getattr(trainer, "ref_model", None) is not None:
        problems.append("a ref_model with FSDP (give a peft_config, whose base model is the reference)")
    if getattr(trainer, "_is_vision_dataset", False) and hasattr(trainer, "ref_model"):
        problems.append("preferences with pictures (use texts)")
    if getattr(trainer, "aux_loss_enabled", False):
        problems.append(
            "the auxiliary loss of experts (each rank sees its own tokens only; set router_aux_loss_coef=0.0)"
        )
    for config in getattr(trainer.model, "peft_config", {}).values():
        if config.is_prompt_learning:
            problems.append(_prompt_learning(config))
    if trainer.model.get_output_embeddings() is not mm_sp.output_layer:
        problems.append(
            "a PEFT adapter on the output layer, or one that trains its copy (leave lm_head out of target_modules and "
            "modules_to_save)"
        )
    _refuse(type(trainer).__name__, problems)


def _prompt_learning(config: Any) -> str:
    return f"{type(config).__name__} (its virtual tokens would be added to each rank's share; use LoRA)"


def _refuse(name: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{name} under MM-SP does not take " + "; ".join(problems))

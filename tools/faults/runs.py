"""Faults of a run: optimizer, offload, memory estimate, compiled code, collections, benchmarks."""

from .fault import CONTRACT, Fault

OFFLOAD = ("tests/training/test_offload.py", "-k", "gradients_are_clipped or cut_parameters and 1.0-1000")
PLATFORM = ("tests/test_accelerator.py", "-k", "few_versions or deterministic_mode")

FAULTS = [
    Fault(
        "token count of the loss misses cp",
        "megatron_vila/training/optimizer.py",
        "dist.all_reduce(num_tokens, group=pg_collection.dp_cp)",
        "dist.all_reduce(num_tokens, group=pg_collection.dp)",
    ),
    Fault(
        "compiled code has versions for inputs that require gradients",
        "megatron_vila/accelerator.py",
        "arg.detach() if isinstance(arg, torch.Tensor) else arg",
        "arg",
        PLATFORM,
    ),
    Fault(
        "code is compiled in deterministic mode too",
        "megatron_vila/accelerator.py",
        "return not torch.are_deterministic_algorithms_enabled()",
        "return True",
        PLATFORM,
    ),
    Fault(
        "state on the device misses its update while the host's comes",
        "megatron_vila/training/offload.py",
        "for own in here[index * per_arrival",
        "for own in here[1 + index * per_arrival",
        OFFLOAD,
    ),
    Fault(
        "a chunk of optimizer state stays on the device after its update",
        "megatron_vila/training/offload.py",
        "_copy_rows(chunk.state, state)",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "a slot is filled before its state went back to the host",
        "megatron_vila/training/offload.py",
        "range(min(SLOTS - 1, len(chunks))))",
        "range(min(SLOTS + 1, len(chunks))))",
        OFFLOAD,
    ),
    Fault(
        "offloaded gradients are not clipped",
        "megatron_vila/training/offload.py",
        "gradients_E.mul_(grad_scale)",
        "pass",
        OFFLOAD,
    ),
    Fault(
        "frames encoded ahead are those of the same row",
        "megatron_vila/training/step.py",
        "zip(rows, (*rows[1:], None), strict=True)",
        "zip(rows, (*rows[:-1], None), strict=True)",
        (CONTRACT, "-k", "encodes_the_next"),
    ),
    Fault(
        "what comes back from the host is in no estimate",
        "megatron_vila/plan/activations.py",
        "most = max(most, held + back)",
        "most = max(most, held)",
        ("tests/models/test_memory_policies.py", "-k", "is_what_is_predicted"),
    ),
    Fault(
        "copies of packed rows in the ring are in no estimate",
        "megatron_vila/plan/activations.py",
        "copies = 1.5 * q * packed",
        "copies = 0",
        ("tests/models/test_workspace.py", "-k", "ring"),
    ),
    Fault(
        "a run's estimate is that of another GPU",
        "megatron_vila/training/memory_report.py",
        "estimate_memory(config, world_size, accelerator.device_memory_bytes())",
        "estimate_memory(config, world_size, 80 * 10**9)",
        ("tests/training/test_memory_report.py", "-k", "share"),
    ),
    Fault(
        "a run's report plans for no GPU",
        "megatron_vila/training/memory_report.py",
        "estimate_memory(config, dist.get_world_size(), accelerator.device_memory_bytes())",
        "estimate_memory(config, dist.get_world_size(), 0)",
        ("tests/training/test_memory_report.py", "-k", "predicted"),
    ),
    Fault(
        "a report compares tensors with what the allocator does not hand out",
        "megatron_vila/training/memory_report.py",
        "{estimate.allocated / GIB:.2f}",
        "{estimate.total / GIB:.2f}",
        ("tests/training/test_memory_report.py", "-k", "predicted"),
    ),
    Fault(
        "full collections pass over all that a run keeps",
        "megatron_vila/training/trainer.py",
        "                    gc.freeze()\n",
        "",
        ("tests/training/test_trainer.py", "-k", "collections"),
    ),
    Fault(
        "what a run kept is never collected",
        "megatron_vila/training/trainer.py",
        "            undo.callback(gc.unfreeze)\n",
        "",
        ("tests/training/test_trainer.py", "-k", "collections"),
    ),
    Fault(
        "a variant is measured beside the model of the one before",
        "benchmarks/worker.py",
        "        accelerator.collect_garbage()\n",
        "",
        ("tests/benchmarks/test_benchmarks.py", "-k", "left_behind"),
    ),
]

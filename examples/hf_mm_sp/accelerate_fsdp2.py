"""Train Qwen2.5-VL on long videos with accelerate and FSDP2 under MM-SP, in a loop of one's own.

    torchrun --nproc-per-node 2 examples/hf_mm_sp/accelerate_fsdp2.py --ulysses 2
    torchrun --nproc-per-node 8 examples/hf_mm_sp/accelerate_fsdp2.py --model FOLDER --data DATA.json --frames 1024 --ulysses 8

Model and optimizer are prepared by accelerate, the DataLoader is not: accelerate would deal its batches to all processes, and the
processes that share samples need the same ones. On CPUs accelerate shards nothing, and weights are replicated by DDP.
"""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from qwen_video import VideoQuestions, arguments, build_model, load_tokenizer, prepare
from torch.utils.data import DataLoader, DistributedSampler

from megatron_vila import processes
from megatron_vila.hf.mm_sp import enable_mm_sp


def main() -> None:
    options = arguments(__doc__)
    on_gpus = torch.cuda.is_available()
    processes.init_distributed()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"],
    )
    accelerator = Accelerator(
        cpu=not on_gpus,
        mixed_precision="bf16" if on_gpus else "no",
        fsdp_plugin=plugin if on_gpus else None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    folder, records = prepare(options)
    tokenizer = load_tokenizer(folder)
    model = build_model(options, len(tokenizer)).train()
    mm_sp = enable_mm_sp(model, options.ulysses, options.ring)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    model, optimizer = accelerator.prepare(model, optimizer)

    dataset = VideoQuestions(records, tokenizer, accelerator.unwrap_model(model).config, options)
    sampler = DistributedSampler(dataset, mm_sp.dp_size, mm_sp.dp_rank, shuffle=True, seed=0)
    loader = DataLoader(
        dataset, batch_size=2, sampler=sampler, collate_fn=mm_sp.collator(), num_workers=options.workers
    )
    batches = iter(loader)
    for step in range(options.steps):
        micro_batches = []
        while len(micro_batches) < options.accumulate:
            batch = next(batches, None)
            if batch is None:
                sampler.set_epoch(step)
                batches = iter(loader)
            else:
                micro_batches.append(batch)
        count = mm_sp.count_supervised(micro_batches)  # of all micro-batches in all processes
        total = 0.0
        for number, batch in enumerate(micro_batches):
            is_last = number + 1 == len(micro_batches)
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                loss = model(**batch, num_items_in_batch=count).loss
                accelerator.backward(loss)
            total += loss.item()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}  loss {total:.4f}", flush=True)
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        options.out / "accelerate", state_dict=weights, is_main_process=accelerator.is_main_process
    )


if __name__ == "__main__":
    main()
    processes.end_distributed()

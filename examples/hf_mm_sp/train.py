"""Train a stock Transformers model with MM-SP and FSDP2, on GPUs with NCCL or on the CPU with gloo.

Two processes, a tiny Qwen2 with random weights, the pages of this repository as text:

    torchrun --nproc-per-node 2 examples/hf_mm_sp/train.py --config examples/hf_mm_sp/configs/tiny-qwen2.json --ulysses 2

A folder with weights and tokenizer is given by --model instead of --config. A video model takes a LLaVA-format JSON file by
--data; without it small synthetic videos are written. --benchmark measures tokens/s and the longest sequence with and without
MM-SP (see sweep.py); it starts the processes itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from samples import TextWindows, VideoQuestions
from sweep import sweep
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from megatron_vila import accelerator, processes
from megatron_vila.data.synthetic import corpus, write_synthetic_set
from megatron_vila.data.tokenizer import train_tokenizer
from megatron_vila.hf.mm_sp import MMSP, enable_mm_sp
from megatron_vila.hf.mm_sp.adapters.llava_onevision import LlavaOnevision

REPO = Path(__file__).resolve().parents[2]
TINY_VOCABULARY = 1024


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder with config, weights and tokenizer")
    source.add_argument(
        "--config", type=Path, help="config.json; weights are random, a tokenizer is trained on the data"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", help="text files, or for a video model one LLaVA-format JSON file"
    )
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument(
        "--stock", action="store_true", help="the same training without MM-SP: each process its own samples"
    )
    parser.add_argument("--kernel", default="auto", help="attention kernel of MM-SP")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text sample")
    parser.add_argument("--frames", type=int, default=8, help="frames of a video")
    parser.add_argument("--samples", type=int, default=2, help="samples of a micro-batch, packed into one row")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/hf_mm_sp"), help="folder for metrics.jsonl and what is made"
    )
    parser.add_argument(
        "--benchmark", type=Path, metavar="CSV", help="measure with and without MM-SP and write a table"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of the benchmark")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="sequences of the benchmark"
    )
    parser.add_argument(
        "--longest", type=int, default=4194304, help="where the benchmark's search for the longest ends"
    )
    parser.add_argument("--variants", nargs="+", help="of the benchmark: stock, 'data parallel', ulysses=N, ring=N")
    parser.add_argument(
        "--share", type=float, default=1 / 8, help="the search ends when this share of the longest is open"
    )
    return parser.parse_args()


def build_model(options: argparse.Namespace, vocabulary: int, device: torch.device) -> PreTrainedModel:
    """The model on ``device`` in float32; random weights are equal on all ranks."""
    config = AutoConfig.from_pretrained(options.model or options.config)
    is_video = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if is_video else AutoModelForCausalLM
    if options.model:
        return auto.from_pretrained(options.model, dtype=torch.float32)
    text = config.get_text_config()
    if text.vocab_size < vocabulary + 2 or options.config.name.startswith("tiny"):
        text.vocab_size = vocabulary + 2
    if is_video:
        config.image_token_id, config.video_token_id = vocabulary, vocabulary + 1
    torch.manual_seed(0)
    with device:
        return auto.from_config(config, dtype=torch.float32)


def shard_weights(model: PreTrainedModel, device: torch.device) -> None:
    """FSDP2 over all processes: each layer by itself, the rest as one; 16-bit compute on GPUs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for module in list(model.modules()):
        if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer")):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def prepare_files(options: argparse.Namespace, is_video: bool) -> tuple[Path, list[Path]]:
    """Folder of the tokenizer and data files; rank 0 makes what is missing."""
    data = options.data or (
        [options.out / "videos/train_16.json"] if is_video else [REPO / "README.md", *REPO.glob("docs/*.md")]
    )
    if dist.get_rank() == 0:
        if is_video and not options.data:
            write_synthetic_set(options.out / "videos", [16], train=16, evaluation=0)
        if not options.model:
            texts = corpus() if is_video else [file.read_text(encoding="utf-8") for file in data]
            train_tokenizer(texts, options.out / "tokenizer", TINY_VOCABULARY)
    dist.barrier()
    return options.model or options.out / "tokenizer", sorted(data)


def stock_batch(samples: list[dict]) -> dict[str, torch.Tensor]:
    """What Transformers takes without MM-SP: samples of one length, side by side."""
    batch = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in ("input_ids", "labels")}
    if "pixel_values_videos" in samples[0]:
        batch["pixel_values_videos"] = torch.stack([sample["pixel_values_videos"][0][:] for sample in samples])
    return batch


def endless(dataset: Dataset, options: argparse.Namespace, mm_sp: MMSP | None) -> Iterator[dict]:
    """Micro-batches, epoch after epoch; the ranks that share samples draw the same ones."""
    replicas, replica = (mm_sp.dp_size, mm_sp.dp_rank) if mm_sp else (dist.get_world_size(), dist.get_rank())
    sampler = DistributedSampler(dataset, replicas, replica)
    loader = DataLoader(
        dataset,
        options.samples,
        sampler=sampler,
        collate_fn=mm_sp.collator() if mm_sp else stock_batch,
        drop_last=False,
    )
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def train_step(model: PreTrainedModel, batches: list[dict], mm_sp: MMSP | None, device: torch.device) -> float:
    """Gradients of one step; returns the mean loss over its supervised tokens (without MM-SP: of this process)."""
    total = torch.zeros((), device=device)
    count = mm_sp.count_supervised(batches) if mm_sp else None
    # Gradients are reduced after each micro-batch: FSDP2 would hold whole ones until the last.
    for batch in batches:
        if mm_sp:
            loss = model(**batch, num_items_in_batch=count).loss
        else:
            loss = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).loss / len(batches)
        loss.backward()
        total += loss.detach()
    return total.item()


def count_tokens(batches: list[dict], mm_sp: MMSP | None, device: torch.device) -> int:
    """Tokens of a step over all processes, padding left out."""
    own = sum(batch["mm_sp_row"].tokens if mm_sp else batch["input_ids"].numel() for batch in batches)
    tokens = torch.tensor(own, device=device)
    dist.all_reduce(tokens)
    return int(tokens) // (mm_sp.groups.grid.cp if mm_sp else 1)


def train(options: argparse.Namespace) -> None:
    """All steps; writes metrics-RANK.jsonl and prints a line per step."""
    device = accelerator.device()
    options.out.mkdir(parents=True, exist_ok=True)
    is_video = hasattr(AutoConfig.from_pretrained(options.model or options.config), "vision_config")
    tokenizer_folder, data = prepare_files(options, is_video)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = build_model(options, len(tokenizer), device).train()
    if options.recompute:
        model.activation_checkpointing_enable()
    mm_sp = None if options.stock else enable_mm_sp(model, options.ulysses, options.ring, kernel=options.kernel)
    shard_weights(model, device)
    if is_video:
        if mm_sp is None:
            raise SystemExit("--stock runs text models only")
        dataset = VideoQuestions(tokenizer, data[0], options.frames, LlavaOnevision.of(model.config))
    else:
        dataset = TextWindows(tokenizer, data, options.length)
    # The default loops over parameters would need temporaries as large as all of them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    batches = endless(dataset, options, mm_sp)
    accelerator.reset_peak_memory()
    with open(options.out / f"metrics-{dist.get_rank()}.jsonl", "w", encoding="utf-8") as metrics:
        for step in range(options.steps):
            start = time.perf_counter()
            step_batches = [next(batches) for _ in range(options.accumulate)]
            loss = train_step(model, step_batches, mm_sp, device)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.synchronize()
            seconds = time.perf_counter() - start
            tokens = count_tokens(step_batches, mm_sp, device)
            peak_gib = accelerator.peak_memory_bytes() / 2**30
            record = {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds, "peak_gib": peak_gib}
            metrics.write(json.dumps(record) + "\n")
            if dist.get_rank() == 0:
                print(
                    f"step {step}  loss {loss:.4f}  {tokens} tokens  {tokens / seconds:.1f} tokens/s  {peak_gib:.2f} GiB",
                    flush=True,
                )


def main() -> None:
    options = arguments()
    if options.benchmark:
        sweep(options)
        return
    processes.init_distributed()
    train(options)
    processes.end_distributed()


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main()

"""Training of Qwen2.5-VL-7B and Qwen3-VL-8B on one GPU, as CSV: stock Transformers, with Liger, and under ``enable_mm_sp``.

Each variant trains all weights of the same model on the same row: a video, then 256 tokens to learn. Weights are random and,
like gradients and AdamW's two averages, in bf16. Attention of ``stock`` and ``liger`` is sdpa; all variants recompute their
layers in the backward pass. ``speed`` takes whole steps at given lengths. ``longest`` finds the longest row that fits: two
layers of the language model and four of the tower really train, while memory is held for the weights, gradients, averages and
kept inputs of the others.

  python -m benchmarks.video_training speed --model qwen2_5_vl --variant mm_sp --tokens 8192,32768 --out FILE
  python -m benchmarks.video_training longest --model qwen3_vl --variant liger --out FILE
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import hardware, versions
from megatron_vila import accelerator, processes
from megatron_vila.plan.budgets import GIB

COLUMNS = (
    *("model", "variant", "part", "gpus", "tokens", "frames", "time_s", "tokens_per_s", "peak_gib", "loss"),
    *("note", "hardware", "versions", "command"),
)
GRID = 28
"""Patches on each side of a frame: 196 tokens for two frames."""
LEARNED = 256
KEPT_LAYERS, KEPT_BLOCKS = 2, 4
FRAME_MICRO_BATCH = 16
STEP = 2048
"""Tokens to which the longest row is found."""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.video_training", *arguments])
    accelerator.prepare()
    processes.init_distributed()

    def done(row: dict[str, Any]) -> None:
        row = {"model": options.model, "variant": options.variant, "part": options.kind, "gpus": 1} | row
        print(row, flush=True)
        _write(options.out, row | {"hardware": hardware(1), "versions": versions(), "command": command})

    {"speed": speed, "longest": longest}[options.kind](options, done)
    processes.end_distributed()
    return 0


def speed(options: argparse.Namespace, done) -> None:
    training = Training(options.model, options.variant, True, options.small)
    for length in map(int, options.tokens.split(",")):
        try:
            row = training.measured(length, options.steps)
        except torch.OutOfMemoryError as error:
            row = {"tokens": length, "note": f"does not fit: {str(error).splitlines()[0][:60]}"}
        done(row)
        training.forget()


def longest(options: argparse.Namespace, done) -> None:
    training = Training(options.model, options.variant, False, options.small)
    room_gib = (accelerator.device_memory_bytes() / GIB or options.cpu_gib) - 1.5
    fitting = [training.measured(length, 1) for length in (2 * STEP, 4 * STEP)]
    failed = 0
    for _ in range(options.tries):
        before, last = fitting[-2:]
        per_token = (last["peak_gib"] - before["peak_gib"]) / (last["tokens"] - before["tokens"])
        wanted = last["tokens"] + (room_gib - last["peak_gib"]) / max(per_token, 1e-9)
        # far from what was measured the line may be wrong
        wanted = min(wanted, 4 * last["tokens"])
        if failed:
            wanted = min(wanted, (last["tokens"] + failed) / 2)
        length = max(int(wanted), last["tokens"] + STEP)
        if failed and length >= failed - STEP // 2:
            break
        training.forget()
        try:
            fitting.append(training.measured(length, 1))
            print(f"{length} tokens fit: {fitting[-1]['peak_gib']} GiB", flush=True)
        except torch.OutOfMemoryError:
            failed = length
            print(f"{length} tokens do not fit", flush=True)
    note = f"{failed} do not fit" if failed else "longer ones were not tried"
    done(fitting[-1] | {"note": f"few layers trained, memory of the others held; {note}"})


class Training:
    """A model and its optimizer. ``whole``: all its layers are real; else ``KEPT_LAYERS`` and ``KEPT_BLOCKS``, and memory is
    held for the others."""

    def __init__(self, name: str, variant: str, whole: bool, small: bool) -> None:
        self._name = name
        config = CONFIGS[name](small)
        text, vision = config.text_config, config.vision_config
        layers, blocks = (0, 0) if whole else (text.num_hidden_layers - KEPT_LAYERS, vision.depth - KEPT_BLOCKS)
        text.num_hidden_layers, vision.depth = text.num_hidden_layers - layers, vision.depth - blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        if blocks and hasattr(vision, "deepstack_visual_indexes"):
            vision.deepstack_visual_indexes = list(range(len(vision.deepstack_visual_indexes)))
        if blocks and hasattr(vision, "fullatt_block_indexes"):
            vision.fullatt_block_indexes = [KEPT_BLOCKS - 1]
        self.model = _model(config, name)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        if variant == "liger":
            _liger(name, self.model)
        self._mm_sp = None
        if variant == "mm_sp":
            from megatron_vila.hf.mm_sp import enable_mm_sp

            self._mm_sp = enable_mm_sp(self.model, frame_micro_batch=FRAME_MICRO_BATCH)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=torch.cuda.is_available())
        inside = self.model.model
        layer, block = (
            sum(weight.numel() for weight in stack[0].parameters())
            for stack in (inside.language_model.layers, inside.visual.blocks)
        )
        # weights, gradients and two averages, two bytes each
        self._held_bytes = 8 * (layers * layer + blocks * block)
        self._per_token, self._per_patch = 2 * layers * text.hidden_size, 2 * blocks * vision.hidden_size
        self._is_whole, self._is_new = whole, True

    def measured(self, length: int, steps: int) -> dict[str, Any]:
        """Whole steps on a row of about ``length`` tokens: the median of ``steps``, after one more for a whole model."""
        sample, frames = _sample(self.model.config, self._name, length)
        tokens, patches = len(sample["input_ids"]), len(sample["pixel_values_videos"])
        if self._mm_sp is not None:  # the tower keeps what belongs to the frames that it encodes at once
            patches = min(patches, FRAME_MICRO_BATCH * GRID * GRID)
        batch, times = self._batch(sample), []
        held_bytes = self._held_bytes + self._per_token * tokens + self._per_patch * patches
        held = torch.empty(held_bytes, dtype=torch.uint8, device=accelerator.device())
        accelerator.reset_peak_memory()
        # the first step of all makes the optimizer's averages
        for _ in range(steps + (self._is_whole or self._is_new)):
            started_s = _now()
            loss = self._step(batch)
            times.append(_now() - started_s)
        self._is_new = False
        del held
        seconds = statistics.median(times[-steps:])
        return {
            "tokens": tokens,
            "frames": frames,
            "time_s": round(seconds, 3) if self._is_whole else "",
            "tokens_per_s": round(tokens / seconds) if self._is_whole else "",
            "peak_gib": round(accelerator.peak_memory_bytes() / GIB, 2),
            "loss": round(loss, 4),
        }

    def _batch(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What a DataLoader's worker makes of the sample, on the host."""
        if self._mm_sp is not None:
            return self._mm_sp.collator()([sample])
        rows = "input_ids", "labels", "mm_token_type_ids"
        return {key: value[None] if key in rows else value for key, value in sample.items()}

    def _step(self, batch: dict[str, Any]) -> float:
        if self._mm_sp is None:
            batch = {key: accelerator.to_device(value, accelerator.device()) for key, value in batch.items()}
            batch["use_cache"] = False
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        accelerator.collect_garbage()


def _qwen2_5_vl(small: bool):
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 2**20, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 2}
        vision |= {"depth": 6, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 256, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen3_vl(small: bool):
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 2**20,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24], "patch_size": 16, "num_position_embeddings": 2304,
    }  # fmt: skip
    if small:
        text |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
        text |= {"num_key_value_heads": 2}
        vision |= {"depth": 6, "hidden_size": 64, "num_heads": 2, "out_hidden_size": 256}
        vision |= {"deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(text_config=text, vision_config=vision)


CONFIGS = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}


def _model(config, name: str):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    kinds = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with accelerator.device(), no_init_weights():
        model = kinds[name]._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    for key, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
        else:
            torch.nn.init.constant_(weight, 0.0 if key.endswith("bias") else 1.0)
    return model


def _liger(name: str, model) -> None:
    """Liger's kernels as its users get them."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl, apply_liger_kernel_to_qwen3_vl

    kinds = {"qwen2_5_vl": apply_liger_kernel_to_qwen2_5_vl, "qwen3_vl": apply_liger_kernel_to_qwen3_vl}
    kinds[name](model=model)


def _sample(config, name: str, length: int) -> tuple[dict[str, Any], int]:
    """A sample of at most ``length`` tokens, on the host, and its frames."""
    generator = torch.Generator().manual_seed(length)
    per_grid = GRID * GRID // config.vision_config.spatial_merge_size**2
    stamp = [] if name == "qwen2_5_vl" else [11, 12, 13, 14, 15]
    open_, close, pad = config.vision_start_token_id, config.vision_end_token_id, config.video_token_id
    group = [*stamp, open_, *[pad] * per_grid, close] if stamp else [pad] * per_grid
    grids = (length - LEARNED - 18) // len(group)
    video = group * grids if stamp else [open_, *group * grids, close]
    text = torch.randint(100, 10_000, (16 + LEARNED,), generator=generator)
    ids = torch.cat([text[:16], torch.tensor(video), text[16:]])
    labels = torch.full_like(ids, -100)
    labels[-LEARNED:] = ids[-LEARNED:]
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(grids * GRID * GRID, width, generator=generator).to(torch.bfloat16)
    sample = {
        "input_ids": ids,
        "labels": labels,
        "mm_token_type_ids": (ids == pad).long() * 2,
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[grids, GRID, GRID]]),
    }
    return sample, grids * vision.temporal_patch_size


def _now() -> float:
    accelerator.synchronize()
    return time.perf_counter()


def _write(path: Path, row: dict[str, Any]) -> None:
    kept = list(csv.DictReader(path.open())) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*kept, row])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("speed", "longest"))
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--variant", choices=("stock", "liger", "mm_sp"), required=True)
    parser.add_argument("--tokens", default="8192,32768", help="speed: lengths of rows")
    parser.add_argument("--steps", type=int, default=3, help="speed: timed steps, after one more")
    parser.add_argument("--tries", type=int, default=6, help="longest: rows to try")
    parser.add_argument("--cpu-gib", type=float, default=4.0, help="longest: room on a CPU, to try the program")
    parser.add_argument("--small", action="store_true", help="tiny layers, to try the program")
    parser.add_argument("--out", type=Path, required=True, help="CSV file, to which the rows are added")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

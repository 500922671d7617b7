"""Fine-tune Qwen2.5-VL on long videos with LoRA and the SFTTrainer of TRL under MM-SP.

    torchrun --nproc-per-node 2 examples/hf_mm_sp/sft_trl.py --ring 2
    torchrun --nproc-per-node 8 examples/hf_mm_sp/sft_trl.py --model FOLDER --data DATA.json --frames 1024 --ulysses 4 --ring 2

The dataset holds paths. The collator makes samples of them whose patches are read when a process needs them; MM-SP calls it with
one sample at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from qwen_video import IGNORE, VideoQuestions, arguments, build_model, load_tokenizer, prepare
from trl import SFTConfig, SFTTrainer

from megatron_vila import processes
from megatron_vila.hf.mm_sp import enable_mm_sp
from megatron_vila.hf.mm_sp.trainer import MMSPTrainer


class VideoSFTTrainer(MMSPTrainer, SFTTrainer):
    """The first added line."""


class Collator:
    """A padded batch of records, with lazy patches."""

    def __init__(self, questions: VideoQuestions) -> None:
        self._questions = questions

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        samples = [self._questions.sample(record) for record in records]
        longest = max(len(sample["input_ids"]) for sample in samples)
        rows: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": []}
        for sample in samples:
            gap = longest - len(sample["input_ids"])
            rows["input_ids"].append(sample["input_ids"] + [0] * gap)
            rows["labels"].append(sample["labels"] + [IGNORE] * gap)
            rows["attention_mask"].append([1] * (longest - gap) + [0] * gap)
        batch: dict[str, Any] = {name: torch.tensor(values) for name, values in rows.items()}
        for name in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
            batch[name] = [value for sample in samples for value in sample[name]]
        return batch


def main() -> None:
    options = arguments(__doc__)
    on_gpus = torch.cuda.is_available()
    processes.init_distributed()
    folder, records = prepare(options)
    tokenizer = load_tokenizer(folder)
    model = build_model(options, len(tokenizer))
    enable_mm_sp(model, options.ulysses, options.ring)  # the second one
    settings = SFTConfig(
        str(options.out / "sft"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        bf16=on_gpus,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        dataloader_num_workers=options.workers,
        logging_steps=1,
        report_to="none",
        use_cpu=not on_gpus,
    )
    trainer = VideoSFTTrainer(
        model,
        settings,
        data_collator=Collator(VideoQuestions(records, tokenizer, model.config, options)),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
    processes.end_distributed()

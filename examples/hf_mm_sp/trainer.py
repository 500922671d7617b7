"""Train Qwen2.5-VL on long videos with the Trainer of Transformers under MM-SP.

    torchrun --nproc-per-node 2 examples/hf_mm_sp/trainer.py --ulysses 2
    torchrun --nproc-per-node 8 examples/hf_mm_sp/trainer.py --model FOLDER --data DATA.json --frames 1024 --ulysses 4 --ring 2

Weights are sharded by FSDP2 on GPUs and replicated on CPUs, where accelerate shards none.
"""

from __future__ import annotations

import torch
from qwen_video import VideoQuestions, arguments, build_model, load_tokenizer, prepare
from transformers import Trainer, TrainingArguments

from megatron_vila import processes
from megatron_vila.hf.mm_sp import enable_mm_sp
from megatron_vila.hf.mm_sp.trainer import MMSPTrainer


class VideoTrainer(MMSPTrainer, Trainer):
    """The first added line."""


def main() -> None:
    options = arguments(__doc__)
    on_gpus = torch.cuda.is_available()
    processes.init_distributed()
    folder, records = prepare(options)
    tokenizer = load_tokenizer(folder)
    model = build_model(options, len(tokenizer))
    enable_mm_sp(model, options.ulysses, options.ring)  # the second one
    settings = TrainingArguments(
        str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        bf16=on_gpus,
        fsdp=on_gpus,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]}
        if on_gpus
        else None,
        activation_checkpointing=True,
        dataloader_num_workers=options.workers,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not on_gpus,
    )
    dataset = VideoQuestions(records, tokenizer, model.config, options)
    trainer = VideoTrainer(model, settings, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
    processes.end_distributed()

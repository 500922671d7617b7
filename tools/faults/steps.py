"""Faults of a run's steps: optimizer, schedule, metrics, what a resume brings back, skipped updates, evaluation."""

from .fault import EVENTS, LLAMA, QWEN2, RING, TRUTH, Fault

BF16 = (TRUTH, "-k", "bf16")
RESUMED = (EVENTS, "-k", "not_work and resumed")
SKIPPED = (EVENTS, "-k", "skipped and straight")
SKIPPED_RESUMED = (EVENTS, "-k", "skipped and resumed")
EVALUATION = (EVENTS, "-k", "evaluation")

TRAINER = "megatron_vila/training/trainer.py"
OPTIMIZER = "megatron_vila/training/optimizer.py"
CHECKPOINT = "megatron_vila/checkpoint/save_load.py"
EVALUATE = "megatron_vila/training/evaluate.py"
FLOPS = "megatron_vila/plan/flops.py"

FAULTS = [
    Fault(
        "weights are loaded after the optimizer has copied others",
        TRAINER,
        """            loaded = load_checkpoint(config.checkpoint.load, [model])
            self._say(f"weights of {config.checkpoint.load}")
        self.model = wrap_ddp(model, config.optim)
        self.optimizer, self.scheduler = build_optimizer([self.model], config.optim, config.train, self.dtype)
""",
        """            self._say(f"weights of {config.checkpoint.load}")
        self.model = wrap_ddp(model, config.optim)
        self.optimizer, self.scheduler = build_optimizer([self.model], config.optim, config.train, self.dtype)
        if found.checkpoint is None and config.checkpoint.load:
            loaded = load_checkpoint(config.checkpoint.load, [model])
""",
        BF16,
    ),
    Fault("beta1 is not passed on", OPTIMIZER, "adam_beta1=optim.beta1,", "", QWEN2),
    Fault("beta2 is not passed on", OPTIMIZER, "adam_beta2=optim.beta2,", "", QWEN2),
    Fault("epsilon is not passed on", OPTIMIZER, "adam_eps=optim.eps,", "", QWEN2),
    Fault("norms and biases decay", OPTIMIZER, "**get_standard_config_overrides(config), ", "", QWEN2),
    Fault(
        "nothing decays",
        OPTIMIZER,
        "start_wd=optim.weight_decay,\n        end_wd=optim.weight_decay,",
        "start_wd=0.0,\n        end_wd=0.0,",
        QWEN2,
    ),
    Fault("the rate of a part is ignored", OPTIMIZER, '"max_lr": part.lr,', '"max_lr": optim.lr,', QWEN2),
    Fault(
        "a part with a rate of its own ends at zero",
        OPTIMIZER,
        '"min_lr": min(optim.min_lr, part.lr)',
        '"min_lr": 0.0',
        QWEN2,
    ),
    Fault("the last rate is ignored", OPTIMIZER, "min_lr=min(optim.min_lr, optim.lr)", "min_lr=0.0", QWEN2),
    Fault(
        "the warm-up takes one step more",
        OPTIMIZER,
        "lr_warmup_steps=warmup_steps(optim, train),",
        "lr_warmup_steps=warmup_steps(optim, train) + 1,",
        QWEN2,
    ),
    Fault(
        "the schedule is one step early",
        OPTIMIZER,
        "    return optimizer, scheduler\n",
        "    scheduler.step(1)\n    return optimizer, scheduler\n",
        QWEN2,
    ),
    Fault("a constant schedule falls", OPTIMIZER, "lr_decay_style=optim.schedule,", 'lr_decay_style="cosine",', LLAMA),
    Fault("gradients are not clipped", OPTIMIZER, "if 0 < limit < norm:", "if False:", QWEN2),
    Fault(
        "the norm is told after clipping",
        OPTIMIZER,
        "return True, norm",
        "return True, min(norm, limit or norm)",
        QWEN2,
    ),
    Fault(
        "a frozen tower learns",
        "megatron_vila/models/vila.py",
        "self.vision.set_trainable(config.optim.vision.trainable)",
        "self.vision.set_trainable(True)",
        LLAMA,
    ),
    Fault(
        "the loss is a mean over rows",
        "megatron_vila/training/step.py",
        "return loss_sum, torch.tensor(supervised, dtype=torch.int, device=loss_sum.device), report",
        "return loss_sum / supervised, torch.tensor(1, dtype=torch.int, device=loss_sum.device), report",
        QWEN2,
    ),
    Fault(
        "tokens and supervised tokens are exchanged",
        TRAINER,
        "tokens=int(tokens),\n            supervised_tokens=outcome.supervised,",
        "tokens=outcome.supervised,\n            supervised_tokens=int(tokens),",
        QWEN2,
    ),
    Fault(
        "frames are left out of the FLOPs",
        TRAINER,
        "r.row.supervised_tokens, r.row.units, self",
        "r.row.supervised_tokens, (), self",
        QWEN2,
    ),
    Fault("attention counts its whole square", FLOPS, "pair=2 * attention", "pair=4 * attention", QWEN2),
    Fault("logits count at every place", FLOPS, "supervised_tokens * price.label", "sum(document_lengths) * price.label", QWEN2),
    Fault(
        "a frozen tower counts as a trained one",
        FLOPS,
        "_passes(trainable, trainable) * vision_layers_run",
        "3 * vision_layers_run",
        LLAMA,
    ),
    Fault(
        "counts are those of one replica", TRAINER, "        dist.all_reduce(sums, group=self.topology.dp)\n", "", RING
    ),
    Fault(
        "the rates that are told are those of the next step",
        TRAINER,
        "        self.scheduler.step(1)\n        return Outcome(loss, supervised, updated, norm, rates)",
        "        self.scheduler.step(1)\n        rates = learning_rates(self.optimizer, self.config.optim)\n        return Outcome(loss, supervised, updated, norm, rates)",
        QWEN2,
    ),
    Fault(
        "the schedule waits for a skipped update",
        TRAINER,
        "self.scheduler.step(1)",
        "self.scheduler.step(int(updated))",
        SKIPPED,
    ),
    Fault(
        "a skipped update counts as one of Adam's",
        OPTIMIZER,
        "        return False, norm\n",
        "        optimizer.step_with_ready_grads()\n        return False, norm\n",
        SKIPPED,
    ),
    Fault(
        "skipped updates are not counted over a resume",
        TRAINER,
        'self.step, self.skipped = extra["step"], extra["skipped"]',
        'self.step, self.skipped = extra["step"], 0',
        SKIPPED_RESUMED,
    ),
    Fault(
        "counts are not kept over a resume",
        TRAINER,
        'in carried_counts(extra["counts"]).items()',
        "in {}.items()",
        RESUMED,
    ),
    Fault(
        "a resume repeats the rows of a step",
        TRAINER,
        "None, loaded.plan.after",
        "None, self.stream",
        RESUMED,
    ),
    Fault(
        "a resume begins the samples again",
        "megatron_vila/training/place.py",
        'return StreamState.from_json(kept, samples), ""',
        'return StreamState(), ""',
        RESUMED,
    ),
    Fault(
        "Adam begins to count again after a resume",
        CHECKPOINT,
        'set_step(optimizer, saved["adam_step"])',
        "pass",
        RESUMED,
    ),
    Fault(
        "the schedule begins again after a resume",
        CHECKPOINT,
        'scheduler.num_steps = saved["scheduler_steps"]',
        "scheduler.num_steps = 0",
        RESUMED,
    ),
    Fault(
        "Adam forgets its means at a resume",
        CHECKPOINT,
        'target.copy_(loaded["optimizer"][name].view_as(target))',
        "target.zero_()",
        RESUMED,
    ),
    Fault(
        "a broken held-out sample counts as one that was tested",
        EVALUATE,
        "return (_BROKEN if row.kind",
        "return (_TESTED if row.kind",
        EVALUATION,
    ),
    Fault(
        "a replica is given the held-out samples of the first",
        "megatron_vila/data/held_out.py",
        "return step * self._grid.dp + self._grid.coordinates(self._rank).dp",
        "return step * self._grid.dp",
        ("tests/training/test_evaluate.py",),
    ),
    Fault(
        "held-out samples that nobody could test have a part in chance",
        EVALUATE,
        "chance_level(records, tested)",
        "chance_level(records, [k for k in range(len(records)) if k not in records.bad])",
        EVALUATION,
    ),
    Fault(
        "one token right makes a sample right",
        "megatron_vila/training/step.py",
        "return [w == 0 if s",
        "return [w < s if s",
        EVALUATION,
    ),
    Fault(
        "the loss of an evaluation is a mean over samples",
        EVALUATE,
        '"loss": loss / max(tokens, 1)',
        '"loss": loss / max(counted, 1)',
        EVALUATION,
    ),
    Fault(
        "chance is that of the rarest answer",
        "megatron_vila/training/feed.py",
        "max(answers.values(), default=0)",
        "min(answers.values(), default=0)",
        EVALUATION,
    ),
]

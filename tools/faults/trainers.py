"""Faults of Trainers under MM-SP: who gets which samples, what is counted, whose mean the loss is."""

from .fault import Fault

_TRAINER, _DATA = "megatron_vila/hf/mm_sp/trainer.py", "megatron_vila/hf/mm_sp/trainer_data.py"
_TEST = "tests/hf/test_mm_sp_trainer.py"
TRAINER, SFT, DPO = ((_TEST, "-k", name) for name in ("trains_evaluates", "sft", "dpo"))
DEALT = ("tests/hf/test_mm_sp_trainer_data.py",)

FAULTS = [
    Fault(
        "accelerate deals batches to processes and not to replicas",
        _DATA,
        "num_processes=mm_sp.dp_size,",
        "num_processes=mm_sp.groups.everyone.size(),",
        TRAINER,
    ),
    Fault(
        "workers of a replica draw other random numbers on each rank",
        _DATA,
        "loader.generator = torch.Generator().manual_seed(seed)",
        "loader.generator = None",
        DEALT,
    ),
    Fault(
        "replicas that evaluate count some samples twice",
        _DATA,
        "even_batches=is_training",
        "even_batches=True",
        DEALT,
    ),
    Fault(
        "documents that TRL packed are taken for one",
        _DATA,
        "starts |= restarts if mask is None else False",
        "starts |= False",
        SFT,
    ),
    Fault(
        "a Trainer counts shifted labels as if they were not",
        _TRAINER,
        "return self.mm_sp.count_supervised(batch_samples)",
        "return super()._get_num_items_in_batch(batch_samples, device)",
        TRAINER,
    ),
    Fault(
        "the loss is scaled by the number of processes",
        _TRAINER,
        "return (outputs.loss, outputs) if return_outputs else outputs.loss",
        "return outputs.loss * self.args.world_size",
        TRAINER,
    ),
    Fault(
        "an evaluation weighs batches alike, whatever their number of samples",
        _TRAINER,
        "samples if supervised else 0",
        "min(samples, 1) if supervised else 0",
        TRAINER,
    ),
    Fault(
        "a resumed run starts from other weights where saved tensors have other names",
        _TRAINER,
        "self.model.load_state_dict(loaded.state_dict())",
        "del loaded",
        TRAINER,
    ),
    Fault(
        "the gradient of scored tokens is a share of what it should be",
        "megatron_vila/hf/mm_sp/scored.py",
        "return grad * ctx.size, None",
        "return grad, None",
        DPO,
    ),
]

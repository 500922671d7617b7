"""megatron_vila: long-video visual language models with Multi-Modal Sequence Parallelism on Megatron-Core."""

from megatron_vila import interrupts

__version__ = "0.1.0"

if interrupts.is_command():
    interrupts.end_at_once()

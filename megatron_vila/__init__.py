"""megatron_vila: long-video visual language models with Multi-Modal Sequence Parallelism on Megatron-Core."""

__version__ = "0.1.0"

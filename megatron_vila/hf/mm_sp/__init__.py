"""MM-SP, LongVILA's multi-modal sequence parallelism, for unmodified models of transformers: see ``enable``."""

from megatron_vila.hf.mm_sp.enable import MMSP, enable_mm_sp

__all__ = ["MMSP", "enable_mm_sp"]

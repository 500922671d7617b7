"""Answers questions about long videos: prefill, a cache shared by all GPUs, decoding."""

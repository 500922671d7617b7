"""Converts weights between Hugging Face folders and distributed checkpoints, in one process, one tensor at a time.

Read ``weight_map`` (which tensor is which) and ``hf_config`` (which model a folder describes) first, then ``importer``,
``exporter`` and ``verify``.
"""

"""Weights between Hugging Face folders and distributed checkpoints, in one process, tensor by tensor.

Read first ``weight_map`` (which tensor is which), then ``importer``, ``exporter`` and ``verify``.
"""

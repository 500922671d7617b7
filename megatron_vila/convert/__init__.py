"""The Hugging Face converter: weights between its folders and distributed checkpoints, in one process, tensor by tensor.

Read first ``weight_map`` (which tensor is which) and ``hf_config`` (which model a folder describes), then ``importer``,
``exporter`` and ``verify``.
"""

"""A whole training run that shares nothing with megatron_vila: what the real trainer is held against.

``model.py`` has the model (stock modules of transformers, a projector in plain torch), ``samples.py`` what the model sees of a
record, ``loop.py`` the run, ``files.py`` the records, videos, pictures and weights that both sides read. No file here imports
the package, which ``test_independent_truth.py`` checks, and no setting has a value that is anybody's default.
"""

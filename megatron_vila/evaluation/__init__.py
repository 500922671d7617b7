"""What a trained model can do, asked through the engine that answers users (``generate/``); docs/evaluation.md."""

"""``python -m megatron_vila.checkpoint`` prints the weight map of docs/checkpoints.md."""

from megatron_vila import platform

if __name__ == "__main__":
    platform.prepare()
    # Imported late: Megatron-Core must find the platform prepared.
    from megatron_vila.checkpoint.weight_map import describe

    print(describe(), end="")

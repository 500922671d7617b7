"""``python -m megatron_vila.convert`` prints the weight map of docs/checkpoints.md."""

from megatron_vila import accelerator

if __name__ == "__main__":
    accelerator.prepare()
    # Imported late: Megatron-Core must find the platform prepared.
    from megatron_vila.convert.weight_map import describe

    print(describe(), end="")

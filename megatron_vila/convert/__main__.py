"""``python -m megatron_vila.convert`` prints the weight map of docs/checkpoints.md."""

from megatron_vila.convert.weight_map import describe

if __name__ == "__main__":
    print(describe(), end="")

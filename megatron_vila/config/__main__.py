"""``python -m megatron_vila.config`` prints docs/configuration.md."""

from megatron_vila.config.load import describe_keys

if __name__ == "__main__":
    print(describe_keys(), end="")

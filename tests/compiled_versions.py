"""A program: how many versions of each compiled function training makes, without a GPU and without a compiler behind.

Prints {function: versions} for steps on videos of five lengths.
"""

import json
import sys
from collections import Counter

import torch

from megatron_vila import accelerator, processes


def main() -> None:
    made, compile_with = Counter(), torch.compile

    def counting(function):
        def backend(graph, inputs):
            made[function.__name__] += 1
            return graph.forward

        return compile_with(function, backend=backend)

    # Before the first call of a function, which compiles it.
    accelerator._COMPILED_DEVICE, torch.compile = "cpu", counting
    accelerator.prepare()
    from benchmarks.worker import measured_rows

    processes.init_distributed()
    overrides = ["train.precision=fp32", "memory.recompute=attention_output", "memory.recompute_layers=1"]
    settings = {"config": "models/tiny", "overrides": overrides, "variants": [""], "lengths": [128, 256, 512, 384, 448]}
    settings |= {"video": True, "supervised": 0, "warmup": 0, "timed": 1, "short_warmup": False, "partial": 0}
    settings |= {"without_attention": False, "command": ""}
    list(measured_rows("trial", settings))
    print(json.dumps(made), flush=True)


if __name__ == "__main__":
    sys.exit(main())

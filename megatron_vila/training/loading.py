"""What loading took in a step, which part of it is the limit if a run waits for data, and which setting helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_vila.data.pending_row import DecodeWork

FRAMES = {"decoded_frames": "frames", "source_frames": "source_frames", "engine_frames": "engine_frames"}
"""Names in a record and in ``DecodeWork``: frames that were wanted, frames that were read for them, and how many of the latter
the GPU's video engines decoded."""

SECONDS = {"read_s": "read_s", "decode_s": "decode_s", "preprocess_s": "preprocess_s"}
"""Names in a record and in ``DecodeWork``: seconds of the threads that decode."""

WORTH_A_WORD = 0.02
"""Share of a step's time from which waiting or copying is reported."""

_CURES = {
    "reading files": "prepared shards are smaller (tools/prepare_data.py); otherwise put the files on faster or nearer storage",
    "decoding": "prepare the data once (tools/prepare_data.py), or give a rank more cores (data.workers) and the GPU's video "
    "engines (data.video_decoder=auto)",
    "scaling pictures": "prepare the data once, at the size that the model takes (tools/prepare_data.py), or give a rank more "
    "cores (data.workers)",
}


def loading_of(work: Sequence[DecodeWork], copy_s: float, device: torch.device) -> dict[str, float]:
    """What the rows of a step took to load, summed over all ranks, and ``copy_s``: the seconds in which the training thread
    copied to the device, on the slowest rank. A sum over all ranks."""
    total = sum(work, DecodeWork())
    sums = torch.tensor(
        [getattr(total, name) for name in (*FRAMES.values(), *SECONDS.values())], dtype=torch.float64, device=device
    )
    dist.all_reduce(sums)
    return dict(zip((*FRAMES, *SECONDS), sums.tolist(), strict=True)) | {"copy_s": copy_s}


def averaged(window: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
    """Frames per second and seconds per step over the steps of ``window``, which took ``seconds``."""
    if not all(window):
        return {}
    totals = {name: sum(loading[name] for loading in window) for name in window[0]}
    rates = {f"{name}_per_s": totals.pop(name) / seconds for name in FRAMES}
    return rates | {name: total / len(window) for name, total in totals.items()}


def limit(record: Mapping[str, float]) -> tuple[str, str] | None:
    """What slows a run down, by a record of its steps: a name, and a line that says which setting helps. None if nothing does."""
    step_s, wait_s = record["step_s"], record["data_wait_s"]
    if "read_s" not in record:
        return None
    if wait_s > WORTH_A_WORD * step_s:
        spent = {
            "reading files": record["read_s"],
            "decoding": record["decode_s"],
            "scaling pictures": record["preprocess_s"],
        }
        most = max(spent, key=lambda name: spent[name])
        shares = ", ".join(f"{name} {100 * s / max(sum(spent.values()), 1e-9):.0f}%" for name, s in spent.items())
        line = f"{wait_s:.2f} s of each step of {step_s:.2f} s are spent waiting for data; time of the loading threads: {shares}"
        return most, f"{line}. {_CURES[most][0].upper()}{_CURES[most][1:]}"
    if record["copy_s"] > WORTH_A_WORD * step_s:
        line = f"{record['copy_s']:.2f} s of each step of {step_s:.2f} s are spent copying to the device"
        return "copying", f"{line}; with more ranks for a row (parallel.ulysses, parallel.ring) each of them has fewer frames"
    return None

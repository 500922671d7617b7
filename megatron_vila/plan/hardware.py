"""What a run is planned for: GPUs, hosts and links as figures. A ``Machine`` is given to the plan, which never asks the one that
it runs on; ``accelerator.machine`` describes that.

Sources: NVIDIA's data sheets of the A100, H100, H200, GH200, H20, L40S and L40, its user guides of DGX A100, H100, H200 and B200,
the Blackwell Architecture Technical Brief and the GB200 NVL72 data sheet. Peaks are dense bf16 and fp16 rates, half of what is
given with sparsity; links count one direction. Memory is what PyTorch sees of the GPU (of the A100 the larger one), for the GB200
the published 186 GB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_vila.errors import ConfigError
from megatron_vila.plan.budgets import GIB

# B300 keeps B200's 16-bit rate. The first entry whose words all stand in the device's name counts.
_PEAK_TFLOPS = (
    (("GB300",), 2500.0),
    (("GB200",), 2500.0),
    (("B300",), 2250.0),
    (("B200",), 2250.0),
    (("B100",), 1750.0),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.4),
    (("H100", "NVL"), 835.5),
    (("H100", "PCIe"), 756.5),
    (("H100",), 989.4),
    (("H800", "PCIe"), 756.5),
    (("H800",), 989.4),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
)


@dataclass(frozen=True)
class Machine:
    """A node of a cluster, by what its ranks compute with and send over. What is not known is None.

    ``name`` stands in messages. ``gpu_bytes``: memory of a GPU, 0 where ranks run on the CPU. ``peak_flops``: FLOP/s of a GPU in
    16 bits. ``host_bytes``: memory of a node's host. ``nvlink`` and ``network``: bytes/s that a GPU sends over each;
    ``nvlink_gpus`` are joined by the first, in one node or in several. ``is_here``: the machine at hand, else one planned for.
    """

    name: str
    gpu_bytes: int
    peak_flops: float | None = None
    host_bytes: int | None = None
    gpus_per_node: int | None = None
    nvlink_gpus: int | None = None
    nvlink: float | None = None
    network: float | None = None
    is_here: bool = False

    def rank_bytes(self, ranks: int) -> int:
        """Memory of a rank, one of ``ranks`` on the node: its GPU's, or its share of the host's."""
        return self.gpu_bytes or (self.host_bytes or 0) // ranks

    def of_a_rank(self, ranks: int) -> str:
        """What has ``rank_bytes``, for a message."""
        return self.name if self.gpu_bytes else f"each of {ranks} processes on {self.name}"


def peak_flops(gpu_name: str) -> float | None:
    """Peak dense 16-bit FLOP/s of a GPU, by its name as ``torch.cuda.get_device_name`` gives it; None if it is not known."""
    return next((peak * 1e12 for words, peak in _PEAK_TFLOPS if all(word in gpu_name for word in words)), None)


def _node(gpu: str, gib: float, host_gb: int, gpus: int, nvlink_gpus: int, nvlink_gb: int, network_gb: int) -> Machine:
    return Machine(
        name=f"an {gpu}" if gpu[0] in "AH" else f"a {gpu}",
        gpu_bytes=int(gib * GIB),
        peak_flops=peak_flops(gpu),
        host_bytes=host_gb * 10**9,
        gpus_per_node=gpus,
        nvlink_gpus=nvlink_gpus,
        nvlink=nvlink_gb * 1e9,
        network=network_gb * 1e9,
    )


# DGX nodes with one network card of 200 (A100) or 400 Gbit/s for each GPU; of a GB200 NVL72 a compute tray.
PRESETS = {
    "a100": _node("A100", 79.1, host_gb=2000, gpus=8, nvlink_gpus=8, nvlink_gb=300, network_gb=25),
    "b200": _node("B200", 178.3, host_gb=2000, gpus=8, nvlink_gpus=8, nvlink_gb=900, network_gb=50),
    "gb200": _node("GB200", 173.2, host_gb=960, gpus=4, nvlink_gpus=72, nvlink_gb=900, network_gb=50),
    "h100": _node("H100", 79.1, host_gb=2000, gpus=8, nvlink_gpus=8, nvlink_gb=450, network_gb=50),
    "h200": _node("H200", 139.8, host_gb=2000, gpus=8, nvlink_gpus=8, nvlink_gb=450, network_gb=50),
}
"""Machines by the names that ``--gpu`` takes."""

UNNAMED = Machine("a GPU of 80 GB", 80 * 10**9)
"""Planned for where nothing is said about the machine."""


def machine_of(gpu: str) -> Machine:
    """The machine that ``--gpu`` names: one of ``PRESETS``, or a GPU by its memory, as ``80GB`` or ``79.2GiB``.

    Raises ``ConfigError`` for anything else.
    """
    if gpu.lower() in PRESETS:
        return PRESETS[gpu.lower()]
    amount = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?(GB|GiB)", gpu, re.IGNORECASE)
    size = int(float(amount[1]) * (GIB if amount[2].lower() == "gib" else 10**9)) if amount else 0
    if amount is None or size < GIB:
        raise ConfigError(
            f"command line: --gpu {gpu} is not a GPU that is known here; use {', '.join(PRESETS)}, or the memory of one, e.g. "
            "80GB or 79.2GiB"
        )
    return Machine(f"a GPU of {amount[1]} {amount[2]}", size)

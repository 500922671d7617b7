"""What a run is planned for: GPUs, hosts and links as figures. A ``Machine`` is given to the plan, which never asks the one that
it runs on; ``accelerator.machine`` describes that.

Figures and where NVIDIA publishes them (peaks are dense bf16 and fp16, half of what is told with sparsity; links count one
direction, half of what is told for NVLink):

* A100: 312 TFLOP/s, NVLink 600 GB/s (data sheet of the A100 80GB); 8 GPUs, 8 ConnectX-6 or -7 of 200 Gbit/s, 2 TB (user guide of
  the DGX A100 with 640 GB).
* H100, H200: 1,979 TFLOP/s sparse, NVLink 900 GB/s (their data sheets); 8 GPUs, 8 ConnectX-7 of 400 Gbit/s, 2 TB (user guide of
  DGX H100 and H200; reference architecture of DGX BasePOD, "Core Components").
* B200: 2.25 PFLOP/s (Blackwell Architecture Technical Brief, HGX B200); 8 GPUs with 14.4 TB/s of NVLink together, 8 ConnectX-7 of
  400 Gbit/s, 2 TB (user guide of DGX B200, "Introduction").
* GB200: 2.5 PFLOP/s, NVLink 1.8 TB/s, 480 GB at each Grace (data sheet of the GB200 NVL72); 4 GPUs, 2 Grace and 4 ConnectX-7 of
  400 Gbit/s in a compute tray, 72 GPUs of 18 trays joined by NVLink (user guide of DGX GB200, "Hardware").
* Other GPUs: data sheets of GH200, H20, L40S and L40.

Read on pages of NVIDIA itself: DGX B200, DGX GB200 (hardware), DGX BasePOD (H100, H200). Read in copies by others: the peaks of
A100, H200, B200 and GB200 (one copy gives 2.25 PFLOP/s for the last), NVLink of A100, H100 and H200. Not confirmed: the network
and host of the DGX A100, the peak of the H100, the 480 GB of a Grace.

Memory is what PyTorch sees, which is less than is sold: 79.1 GiB of an A100 or H100 with 80 GB, 139.8 of the 141 GB of an H200,
178.3 of the 180 GB of a B200, 184.3 of the 186 GB of a GB200.
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
    16 bits. ``host_bytes``: memory of a node's host. ``nvlink`` and ``network``: bytes/s that a GPU sends over each, and receives
    at the same time; ``nvlink_gpus`` are joined by the first, in one node or in several. ``is_here``: the machine at hand, else
    one planned for.
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

    def joined_ranks(self, ranks: int) -> int:
        """How many ranks in a row NVLink joins where ``ranks`` run on a node: those of one node if that is not known."""
        if self.nvlink_gpus is None or self.gpus_per_node is None:
            return ranks
        return min(self.nvlink_gpus, ranks * max(1, self.nvlink_gpus // self.gpus_per_node))

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
    "gb200": _node("GB200", 184.3, host_gb=960, gpus=4, nvlink_gpus=72, nvlink_gb=900, network_gb=50),
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

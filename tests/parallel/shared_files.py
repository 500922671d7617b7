"""Peer memory without GPUs: files in memory that all ranks of a group map, and a barrier of gloo."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist

from megatron_vila.parallel import peers


class SharedFiles(peers.PeerMemory):
    """``reserve`` as with GPUs, but buffers start as NaN: what is read without having been written shows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group, torch.device("cpu"))

    def reserve(self, nbytes: int) -> bool:
        if nbytes > peers.MOST_PEER_BYTES:
            return False
        self.exchanges += 1
        if nbytes > self._bytes:
            self._bytes = nbytes
            names = [None]
            if self._group.rank() == 0:
                folder = tempfile.mkdtemp(dir="/dev/shm")
                names = [folder]
            dist.broadcast_object_list(names, group=self._group, group_src=0)
            self._files = [
                torch.from_file(f"{names[0]}/{rank}", shared=True, size=nbytes, dtype=torch.uint8)
                for rank in range(self._group.size())
            ]
            dist.barrier(self._group)
            os.unlink(f"{names[0]}/{self._group.rank()}")
            dist.barrier(self._group)
            if self._group.rank() == 0:
                os.rmdir(names[0])
            self._files[self._group.rank()].fill_(255)  # NaN in every float type
            dist.barrier(self._group)
        return True

    def view(self, rank: int, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        elements = self._files[rank].view(dtype)
        return elements[first : first + torch.Size(shape).numel()].view(shape)

    def barrier(self) -> None:
        dist.barrier(self._group)

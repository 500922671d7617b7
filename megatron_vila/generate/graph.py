"""A decoding step that is run again and again: a CUDA graph, so that the host starts its many kernels at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


class GraphedStep:
    """``step``, which takes what it needs from tensors and advances them itself, so that each call is the next step.

    On CUDA the first call runs ``step`` as it is, which compiles what it uses and starts its communicators. The second records
    it, and from then on calls replay the record: in the same tensors, and without running any Python of ``step``. The returned
    tensor is the same in every replay. If recording fails, one log line says why and ``step`` is called as it is. On a CPU it
    always is. ``step`` runs the same collectives either way, so ranks whose recording failed go on with the others.
    """

    def __init__(self, step: Callable[[], torch.Tensor], device: torch.device) -> None:
        self._step = step
        self._to_record = device.type == "cuda"
        self._is_compiled = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> torch.Tensor:
        if self._to_record and self._is_compiled:
            self._to_record = False
            self._record()
        if self._graph is None:
            self._is_compiled = True
            return self._step()
        self._graph.replay()
        return self._result

    def _record(self) -> None:
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        numbers = torch.cuda.default_generators[stream.device.index]
        before = numbers.clone_state()
        try:
            # Other threads may decode frames or watch collectives meanwhile: what they call is not this graph's business.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._result = self._step()
            self._graph = graph
        except Exception as error:  # whatever a step does that a graph cannot hold
            # where the recording cannot even end, its stream and the state of random numbers stay those of a recording
            torch.cuda.set_stream(stream)
            numbers.graphsafe_set_state(before)
            reason = str(error.__context__ or error).strip().partition("\n")[0]
            logger.warning("a decoding step is no CUDA graph, so decoding is slower: %s", reason)

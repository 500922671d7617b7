"""SwiGLU and the matrix products around it: as separate kernels, or on Hopper inside QuACK's products (``quack-kernels``).

QuACK forms SwiGLU and its gradient from what the product has in registers, so no kernel of their own goes through memory.
It works on gate and up of a column side by side: its [T, 2F] holds gate 0, up 0, gate 1, up 1, and so on. Weights
and their gradients keep Megatron's order, all gates before all ups; QuACK reads and writes them through a layout. Its kernels
are compiled at first use (seconds each) and kept on disk.

Legend: T tokens, H hidden size, F width of the MLP of this tensor-parallel rank.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch

from megatron_vila.models.decoder.fused import swiglu, swiglu_backward_
from megatron_vila.models.decoder.weight_gradient import WeightGradient


class Apart:
    """PyTorch's products, any dtype and device. ``gate_up`` [T, 2F] has all gates before all ups."""

    def gate_up(self, hidden_TH: torch.Tensor, fc1_2FH: torch.Tensor) -> torch.Tensor:
        """[T, H] to gate and up [T, 2F]."""
        return hidden_TH @ fc1_2FH.t()

    def forward(self, hidden_TH: torch.Tensor, fc1_2FH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up [T, 2F], and silu(gate) * up [T, F]."""
        gate_up_T2F = self.gate_up(hidden_TH, fc1_2FH)
        return gate_up_T2F, swiglu(gate_up_T2F)

    def backward(
        self, grad_TH: torch.Tensor, fc2_HF: torch.Tensor, gate_up_T2F: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """silu(gate) * up [T, F] once more, and the gradients of gate and up [T, 2F], from that of the MLP's output."""
        inner_TF = grad_TH @ fc2_HF  # the gradient of silu(gate) * up, over which its value is written next
        dgate_up_T2F = swiglu_backward_(gate_up_T2F, inner_TF)
        return inner_TF, dgate_up_T2F

    def input_gradient(self, dgate_up_T2F: torch.Tensor, fc1_2FH: torch.Tensor, out: torch.Tensor) -> None:
        """The gradient of the MLP's input into ``out`` [T, H]."""
        torch.mm(dgate_up_T2F, fc1_2FH, out=out)

    def add_weight_gradient(self, dgate_up_T2F: torch.Tensor, hidden_TH: torch.Tensor, total: WeightGradient) -> None:
        """The gradient of the weight of gate and up [2F, H], in Megatron's order, to ``total``."""
        total.add(dgate_up_T2F, hidden_TH)


class Inside:
    """QuACK's products of bfloat16 on Hopper; sums in float32, rounded once. ``gate_up`` [T, 2F] alternates gate and up."""

    def __init__(self) -> None:
        from quack import gemm_interface
        from quack.gemm_config import GemmConfig

        self._gated, self._gated_backward = gemm_interface.gemm_gated, gemm_interface.gemm_dgated
        self._product = gemm_interface.gemm_tuned.fn
        for function, parameters in (
            (self._gated, {"activation", "config", "concat_layout"}),
            (self._gated_backward, {"activation", "config", "dynamic_scheduler"}),
            (self._product, {"C", "config", "concat_layout"}),
        ):
            if not parameters <= set(inspect.signature(function).parameters):
                raise ImportError(f"another version of quack-kernels is installed ({function.__name__})")

        def tile(rows: int, columns: int, pingpong: bool = False) -> GemmConfig:
            return GemmConfig(tile_m=rows, tile_n=columns, pingpong=pingpong, is_dynamic_persistent=False)

        # Of six within 2 % of the fastest on an H200, at 16K and at 64K tokens of Llama-3-8B. With "pingpong" one warp group's
        # epilogue runs under the product of another: the gradient of SwiGLU has a long one.
        self._forward_tile, self._backward_tile = tile(256, 192), tile(128, 192, pingpong=True)
        self._input_tile, self._weight_tile = tile(256, 192), tile(128, 256)

    def gate_up(self, hidden_TH, fc1_2FH):
        gate_up_T2F = hidden_TH.new_empty(len(hidden_TH), len(fc1_2FH))
        self._product(hidden_TH, fc1_2FH.t(), gate_up_T2F, config=self._forward_tile, concat_layout=("B",))
        return gate_up_T2F

    def forward(self, hidden_TH, fc1_2FH):
        return self._gated(hidden_TH, fc1_2FH.t(), activation="swiglu", config=self._forward_tile, concat_layout=("B",))

    def backward(self, grad_TH, fc2_HF, gate_up_T2F):
        dgate_up_T2F, inner_TF = self._gated_backward(
            grad_TH, fc2_HF, gate_up_T2F, activation="swiglu", dynamic_scheduler=False, config=self._backward_tile
        )
        return inner_TF, dgate_up_T2F

    def input_gradient(self, dgate_up_T2F, fc1_2FH, out):
        self._product(dgate_up_T2F, fc1_2FH, out, config=self._input_tile, concat_layout=("B",))

    def add_weight_gradient(self, dgate_up_T2F, hidden_TH, total):
        total.add(dgate_up_T2F, hidden_TH, self._multiply)

    def try_once(self, device: torch.device) -> None:
        """Compile and run each product on small operands, so that what does not work here raises now and not in a step."""
        x_TH, fc1_2FH, fc2_HF = (torch.zeros(rows, 64, dtype=torch.bfloat16, device=device) for rows in (64, 128, 64))
        self.forward(x_TH, fc1_2FH)
        _, dgate_up_T2F = self.backward(x_TH, fc2_HF, self.gate_up(x_TH, fc1_2FH))
        self.input_gradient(dgate_up_T2F, fc1_2FH, out=torch.empty_like(x_TH))
        total = WeightGradient(fc1_2FH, 1)
        for _ in range(2):  # alone, and added to what is there
            self.add_weight_gradient(dgate_up_T2F, x_TH, total)
        torch.cuda.synchronize(device)  # a kernel that fails does so here

    def _multiply(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        parts = {"C": out, "concat_layout": ("C", "out")} if add else {"concat_layout": ("out",)}
        self._product(a, b, out, config=self._weight_tile, **parts)


APART = Apart()

FEWEST_TOKENS = 128
"""Below, a product reads weights more than it computes, for which QuACK's tiles are not made."""


def products_for(hidden_TH: torch.Tensor, fc1_2FH: torch.Tensor, fc2_HF: torch.Tensor) -> Apart | Inside:
    """``Inside`` where QuACK is installed and has been measured (bfloat16 on Hopper) and rows are whole vectors of 16 bytes."""
    if len(hidden_TH) < FEWEST_TOKENS:
        return APART
    operands = hidden_TH, fc1_2FH, fc2_HF
    sums = [total for weight in (fc1_2FH, fc2_HF) if (total := getattr(weight, "main_grad", None)) is not None]
    if hidden_TH.is_cuda and all(x.dtype == torch.bfloat16 for x in operands) and all(map(_in_vectors, (*operands, *sums))):
        inside = _inside(hidden_TH.device)
        return APART if isinstance(inside, str) else inside
    return APART


def reason_for_apart(device: torch.device) -> str | None:
    """Why products on ``device`` have no SwiGLU inside; None if they have."""
    inside = _inside(device)
    return inside if isinstance(inside, str) else None


def _in_vectors(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


@cache
def _inside(device: torch.device) -> Inside | str:
    """The products, or why there are none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "QuACK's products have been tried on Hopper GPUs only"
    try:
        inside = Inside()
        inside.try_once(device)
        return inside
    except ModuleNotFoundError as error:
        return f"the package quack-kernels is not installed (no module {error.name}); pip install quack-kernels (extra gpu)"
    except Exception as error:  # another version, or its compiler does not load or fails
        return f"the package quack-kernels does not work here ({type(error).__name__}: {error})"

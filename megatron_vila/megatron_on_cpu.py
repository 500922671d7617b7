"""Megatron-Core (0.16.1 and 0.19.2), which is written for GPUs only, on a CPU.

Every ``megatron.core`` module gets a private ``torch`` namespace whose tensor factories, devices, streams and random state are
the CPU's. Code outside ``megatron.core`` keeps the real ``torch``; no operator becomes slower.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types

import torch

_MCORE = "megatron.core"
_FACTORIES = (
    *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "empty_strided"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)


def redirect(cuda: types.ModuleType) -> None:
    """Redirect the modules of ``megatron.core``, those imported already and those to come, to the CPU, and switch off their
    ``torch.compile`` fusions. ``cuda`` is what they get in the place of ``torch.cuda``. Calling again is free."""
    if any(isinstance(finder, _RedirectingFinder) for finder in sys.meta_path):
        return
    finder = _RedirectingFinder(_cpu_torch(cuda))
    sys.meta_path.insert(0, finder)
    for name, module in list(sys.modules.items()):
        if name == _MCORE or name.startswith(_MCORE + "."):
            finder.redirect(module)
    _redirect_methods()


class _RedirectingFinder(importlib.abc.MetaPathFinder):
    """Import hook: finds ``megatron.core`` modules as usual and redirects each one as soon as it is executed."""

    def __init__(self, cpu_torch: types.ModuleType):
        self._torch = cpu_torch

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _MCORE and not fullname.startswith(_MCORE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            execute = spec.loader.exec_module

            def exec_and_redirect(module):
                execute(module)
                self.redirect(module)

            spec.loader.exec_module = exec_and_redirect  # type: ignore[method-assign]
        return spec

    def redirect(self, module: types.ModuleType) -> None:
        names = vars(module)
        if names.get("torch") is torch:
            names["torch"] = self._torch
        if module.__name__ == f"{_MCORE}.jit":
            module.disable_jit_fuser()
        if module.__name__ == f"{_MCORE}.tensor_parallel.random":
            names["_get_cuda_rng_state"] = self._torch.cuda.get_rng_state
            names["_set_cuda_rng_state"] = self._torch.cuda.set_rng_state
        # A module that was imported before prepare() may hold compiled helpers: put the plain functions back.
        for name, value in list(names.items()):
            if isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
                names[name] = value._torchdynamo_orig_callable


def _cpu_torch(cuda: types.ModuleType) -> types.ModuleType:
    """A twin of ``torch`` whose factories and ``cuda`` part live on the CPU; everything else is torch's own."""
    twin = types.ModuleType("torch", torch.__doc__)
    vars(twin).update(vars(torch))
    vars(twin).update(__getattr__=functools.partial(getattr, torch), cuda=cuda)
    for name in _FACTORIES:
        setattr(twin, name, _on_cpu(getattr(torch, name)))
    return twin


def _on_cpu(factory):
    @functools.wraps(factory)
    def create(*args, **kwargs):
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _redirect_methods() -> None:
    """Tensor and module methods that move to the GPU, and the type names that Megatron's optimizer compares with.

    Only calls from ``megatron.core`` see the difference. float64 passes for float32 in the optimizer, whose float32 path then
    keeps the parameter's own dtype throughout.
    """

    def from_mcore(part: str = "") -> bool:
        return sys._getframe(2).f_globals.get("__name__", "").startswith(_MCORE + part)

    def identity_for_mcore(original):
        @functools.wraps(original)
        def method(self, *args, **kwargs):
            return self if from_mcore() else original(self, *args, **kwargs)

        return method

    original_float = torch.Tensor.float

    @functools.wraps(original_float)
    def as_float(self, *args, **kwargs):
        if self.dtype == torch.float64 and from_mcore(".optimizer"):
            return self
        return original_float(self, *args, **kwargs)

    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def type_name(self, *args, **kwargs):
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and from_mcore():
            return result.replace("torch.", "torch.cuda.").replace("Double", "Float")
        return result

    torch.Tensor.type = type_name  # type: ignore[method-assign]
    torch.Tensor.float = as_float  # type: ignore[method-assign]
    torch.Tensor.cuda = identity_for_mcore(torch.Tensor.cuda)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = identity_for_mcore(torch.Tensor.pin_memory)  # type: ignore[method-assign]
    torch.nn.Module.cuda = identity_for_mcore(torch.nn.Module.cuda)  # type: ignore[method-assign]

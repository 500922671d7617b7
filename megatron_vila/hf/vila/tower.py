"""The vision tower of training as transformers, DDP, FSDP2 and PEFT expect one: it runs when it is called, whole, each time.

Legend: F pictures, P pixels of a side, N patches of a picture, C tower width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import SiglipVisionConfig

from megatron_vila.config.schema import VisionConfig
from megatron_vila.models.vision.tower import VisionTower


class VilaVisionTower(VisionTower):
    """SigLIP up to the configured hidden layer; what lies behind it is ``Carried``.

    All pictures of a call are encoded at once: ranks whose numbers of pictures differ run every layer equally often.
    """

    def __init__(self, config: VisionConfig, init_std: float, hf_config: SiglipVisionConfig) -> None:
        super().__init__(config, init_std)
        model = self.vision_model
        # The tower made one for itself; its modules look there for the attention that they use.
        hf_config._attn_implementation = getattr(hf_config, "_attn_implementation", None) or "sdpa"
        for module in model.modules():
            if hasattr(module, "config"):
                module.config = hf_config
        layers = model.encoder.layers
        for place in range(self.num_layers_run, len(layers)):
            layers[place] = Carried(layers[place])
        for name in ("post_layernorm", "head"):
            if hasattr(model, name):
                setattr(model, name, Carried(getattr(model, name)))

    def forward(self, pixels_F3PP: torch.Tensor) -> torch.Tensor:
        """Features [F, N, C] of pictures [F, 3, P, P]: uint8, or floats that are scaled."""
        return self._encode(pixels_F3PP)


class Carried(nn.Module):
    """Weights that nothing runs, under the names of ``module``: they are loaded, moved and saved.

    They are buffers, so that nothing trains them and DDP waits for no gradient. A walk over a model's modules finds none in here,
    because PEFT adapts modules by their names.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            self.register_buffer(name, tensor.detach())
        for name, child in module.named_children():
            self.add_module(name, Carried(child))

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """This module alone."""
        yield prefix, self


def takes_part(*modules: nn.Module) -> bool:
    """Whether these modules must run on every rank in every step: something waits for their gradients (DDP), or they are sharded
    (FSDP2), and running them is collective."""
    return any(
        (parameter.requires_grad and torch.is_grad_enabled()) or isinstance(parameter, DTensor)
        for module in modules
        for parameter in module.parameters()
    )

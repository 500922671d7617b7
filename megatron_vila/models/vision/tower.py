"""The SigLIP vision tower: patch features of one hidden layer, encoded in micro-batches of frames.

LongVILA takes ``hidden_states[-2]`` of SigLIP: the output of the last layer but one, without the final norm, all
patches. Only the layers up to there are run. The rest of the checkpoint (last layers, final norm, pooling head) is
carried as frozen parameters, so that an export loads strictly elsewhere. Weight names are those of the published
``vision_tower`` files.

Legend: F frames, H W picture height and width, P patches of a frame, C tower width, T LLM tokens of a frame, D LLM
width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_vila import accelerator
from megatron_vila.config.schema import VisionConfig
from megatron_vila.models.initialize import initialize_vision
from megatron_vila.models.vision.no_frames import zero_connected_to
from megatron_vila.plan.budgets import frames_at_once
from megatron_vila.plan.geometry import patches_per_square
from megatron_vila.plan.sizes import vision_layers_run


def siglip_config(config: VisionConfig) -> SiglipVisionConfig:
    """The transformers configuration of the same tower."""
    return SiglipVisionConfig(  # type: ignore[call-arg]
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_channels=3,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=config.layer_norm_eps,
        attention_dropout=0.0,
        vision_use_head=config.use_head,
        attn_implementation="sdpa",
    )


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes of pictures, uint8 of any shape, as float32 from -1 to 1 (SigLIP: mean = deviation = 0.5), on their device.

    It takes two operations that round alike on every device, so that a byte becomes the same number everywhere. Floats must be
    scaled already, and are returned as they are. Raises ``TypeError`` for other integer dtypes.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pictures are uint8 (0 to 255), or floats from -1 to 1, not {pixels.dtype}; cast them to uint8")
    return pixels.to(torch.float32).mul_(2 / 255).sub_(1)


class VisionTower(nn.Module):
    """SigLIP up to the configured hidden layer.

    ``config.num_layers`` counts the layers of the checkpoint. Parameters beyond the selected layer never require
    gradients; ``set_trainable`` concerns the others. Weights are drawn on the CPU with standard deviation
    ``init_std`` from torch's generator (the caller seeds it and casts the module). On CUDA the layers are compiled when
    they are first run (``accelerator.compiles``).
    """

    def __init__(self, config: VisionConfig, init_std: float) -> None:
        super().__init__()
        self.config = config
        self.num_patches = patches_per_square(config)
        self.num_layers_run = vision_layers_run(config)
        # Built without storage: transformers would draw random weights of its own, in an order of its version.
        with torch.device("meta"):
            model = SiglipVisionModel(siglip_config(config))
        # transformers 4 wraps the tower once more.
        self.vision_model = getattr(model, "vision_model", model).to_empty(device=torch.get_default_device())
        self.vision_model.embeddings.position_ids.copy_(torch.arange(self.num_patches))
        initialize_vision(self, init_std)
        self.requires_grad_(False)
        self.set_trainable(True)
        self._layers_are_compiled = False

    def used_parameters(self) -> list[nn.Parameter]:
        """The parameters that the features depend on."""
        used = [self.vision_model.embeddings, *self._layers_run()]
        return [parameter for module in used for parameter in module.parameters()]

    def set_trainable(self, trainable: bool) -> None:
        """Train or freeze the parameters that the features depend on; the carried ones stay frozen."""
        for parameter in self.used_parameters():
            parameter.requires_grad_(trainable)

    def forward(self, pixels_F3HW: torch.Tensor) -> torch.Tensor:
        """Features [F, P, C], in the tower's dtype, of pictures [F, 3, image_size, image_size]: uint8, or floats that are scaled.

        The pictures may be on another device: each micro-batch is copied when its turn comes, and scaled and cast there. No
        frames give an empty tensor from which every trainable parameter gets a gradient of exact zeros. Raises ``ValueError``
        for pictures of another size, ``TypeError`` for other whole numbers. No collectives.
        """
        return in_frame_micro_batches(self, self._encode, pixels_F3HW)

    def _encode(self, pixels_F3HW: torch.Tensor) -> torch.Tensor:
        """Features of one micro-batch, which may be empty."""
        size = self.config.image_size
        if pixels_F3HW.dim() != 4 or tuple(pixels_F3HW.shape[1:]) != (3, size, size):
            raise ValueError(
                f"the vision tower got pictures of shape {tuple(pixels_F3HW.shape)} but model.vision.image_size={size} "
                f"needs [frames, 3, {size}, {size}]; resize the pictures or set model.vision.image_size"
            )
        used = self.used_parameters()
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(parameter.requires_grad for parameter in used)):
            if len(pixels_F3HW) == 0:
                return used[0].new_zeros(0, self.num_patches, self.config.hidden_size) + zero_connected_to(used)
            if used[0].device.type != "meta":  # else accelerate's hooks put weights and pictures on one device
                pixels_F3HW = accelerator.to_device(pixels_F3HW, used[0].device)
            # The embeddings cast them to the tower's dtype.
            hidden_FPC = self.vision_model.embeddings(scale_pixels(pixels_F3HW))
            if hidden_FPC.is_cuda and accelerator.compiles() and not self._layers_are_compiled:
                self._compile_layers()
            for layer in self._layers_run():
                hidden_FPC = layer(hidden_FPC, attention_mask=None)
                if isinstance(hidden_FPC, tuple):
                    hidden_FPC = hidden_FPC[0]
            return hidden_FPC

    def _compile_layers(self) -> None:
        for layer in self._layers_run():
            # With padded rows, code for any batch size fails on tensors that code for one batch size has saved (torch 2.11,
            # 2.13).
            layer.compile(options={"comprehensive_padding": False})
        self._layers_are_compiled = True

    def _layers_run(self) -> list[nn.Module]:
        return list(self.vision_model.encoder.layers)[: self.num_layers_run]


def in_frame_micro_batches(
    tower: VisionTower, encode: Callable[[torch.Tensor], torch.Tensor], pixels_F3HW: torch.Tensor
) -> torch.Tensor:
    """``encode`` over at most ``frame_micro_batch`` frames at once (0: by memory), the results concatenated along F.

    With ``recompute`` the backward pass runs ``encode`` again, one micro-batch at a time, instead of keeping what it
    computed.
    """
    if tower.config.recompute and torch.is_grad_enabled():
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.used_parameters())
    at_once = frames_at_once(tower.config, learns, tower.used_parameters()[0].element_size(), accelerator.device_memory_bytes())
    parts = [encode(part_F3HW) for part_F3HW in pixels_F3HW.split(at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def encode_frames(tower: VisionTower, projector: nn.Module, pixels_F3HW: torch.Tensor) -> torch.Tensor:
    """Projected tokens [F, T, D] of pictures [F, 3, H, W] as the tower takes them: both together, micro-batch by micro-batch.

    Equal to ``projector(tower(pixels))``, but the patch features of all frames never exist at once, and ``recompute``
    covers the projector too. No collectives.
    """
    return in_frame_micro_batches(tower, lambda part_F3HW: projector(tower._encode(part_F3HW)), pixels_F3HW)


class FrameEncoder:
    """``encode_frames`` for one micro-batch after the other.

    After ``start``, the frames of the next micro-batch are encoded while the layers of the current one run, on a CUDA stream of
    their own, which uses the GPU where the layers leave it idle. Autograd runs their backward pass on the same stream. On a CPU
    it is the same work in the same order.
    """

    def __init__(self, tower: VisionTower, projector: nn.Module) -> None:
        self._tower, self._projector = tower, projector
        self._cuda = accelerator.cuda()
        self._stream = self._cuda.Stream()
        self._ahead: tuple[torch.Tensor, torch.Tensor] | None = None  # pixels and their tokens

    def __call__(self, pixels_F3HW: torch.Tensor) -> torch.Tensor:
        """Projected tokens [F, T, D]; those that ``start`` has made, if it was given this very tensor."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not pixels_F3HW:
            tokens_FTD = encode_frames(self._tower, self._projector, pixels_F3HW)
        else:
            tokens_FTD = ahead[1]
            self._cuda.current_stream().wait_stream(self._stream)
            if tokens_FTD.is_cuda:
                tokens_FTD.record_stream(self._cuda.current_stream())
        # The weights are ready by now.
        self._stream.wait_stream(self._cuda.current_stream())
        return tokens_FTD

    def start(self, pixels_F3HW: torch.Tensor) -> None:
        """Encode the frames of the next call. Called once the layers of the current micro-batch are queued.

        Does nothing if the tower keeps its activations, because those of two micro-batches would be in memory at once.
        """
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._tower.used_parameters())
        if learns and not self._tower.config.recompute:
            return
        with self._cuda.stream(self._stream):
            self._ahead = pixels_F3HW, encode_frames(self._tower, self._projector, pixels_F3HW)

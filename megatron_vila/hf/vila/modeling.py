"""VILA as a transformers model: our vision tower and projector in front of transformers' own Llama or Qwen2.

Tower and projector are the modules of training, so they give the same features. The language model is that of transformers,
with its KV cache, its attention kernels and its ``generate``. Weight names are those of the flat layout: ``llm.*``,
``vision_tower.vision_model.*``, ``mm_projector.layers.*``.

Legend: B sequences, S tokens of a sequence, F pictures (images and video frames of all sequences, in order), P pixels of a
side, T tokens of a picture, H width of the language model, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from megatron_vila.hf.vila.configuration import VilaConfig
from megatron_vila.hf.vila.weights import read_weights
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import VisionTower, encode_frames

_LANGUAGE_MODELS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}


class VILAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A VILA that takes token ids with places for visual tokens, and the pictures that fill these places.

    ``VilaProcessor`` makes both. A model that is made from a configuration alone has random weights.
    """

    config_class = VilaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionTower", "Projector"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        text, ours = config.get_text_config(), config.model_settings
        std = text.initializer_range
        self.vision_tower = VisionTower(ours.vision, std)
        # The tower has a configuration of its own, made from our settings.
        attention = getattr(config.vision_config, "_attn_implementation", None) or "sdpa"
        self.vision_tower.vision_model.set_attn_implementation(attention)
        self.mm_projector = Projector(ours.projector, ours.vision, text.hidden_size, std)
        self.llm = _LANGUAGE_MODELS[text.model_type](text)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        config: VilaConfig | None = None,
        **kwargs: Any,
    ) -> VILAForConditionalGeneration:
        """Load a folder of either layout; keywords as in transformers (``dtype``, ``device_map``, ``attn_implementation``, ...).

        Raises ``ConversionError`` listing every tensor that is missing, extra or of another shape, and files that are damaged
        or pickled; ``FileNotFoundError`` for a path that is no local folder.
        """
        folder = local_folder(pretrained_model_name_or_path)
        if config is None:
            config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        tensors = read_weights(folder, config.model_settings)
        # transformers takes no folder together with tensors, so the generation settings in the folder are read here.
        result = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.name_or_path = model.config.name_or_path = str(folder)
        if kwargs.get("generation_config") is None:
            for place in (folder, folder / "llm"):
                if (place / "generation_config.json").is_file():
                    model.generation_config = GenerationConfig.from_pretrained(place)
                    break
        return result

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.llm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected tokens [F, T, H] of pictures [F, 3, P, P], images or video frames, as uint8 or as the processor's floats."""
        return encode_frames(self.vision_tower, self.mm_projector, pixel_values)

    def get_video_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Projected tokens [F, T, H] of the frames [F, 3, P, P] of one video or several, or [N, F, T, H] of [N, F, 3, P, P]."""
        features = self.get_image_features(pixel_values_videos.flatten(end_dim=-4))
        return features.unflatten(0, pixel_values_videos.shape[:-3])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and, with ``labels``, the loss, as transformers' language models give them.

        ``input_ids`` int64 [B, S] hold ``image_token_id`` or ``video_token_id`` in the places of visual tokens, ``pixel_values``
        [F, 3, P, P] the pictures in the order of their places. Raises ``ValueError`` if the number of places is not that of the
        pictures' tokens, and unless exactly one of ``input_ids`` and ``inputs_embeds`` is given. Visual tokens in ``labels``, as
        in a copy of ``input_ids``, count as -100: nothing is learned of them.
        """
        if labels is not None:
            labels = cast(torch.LongTensor, labels.masked_fill(self._is_visual(labels), -100))
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("both or neither of input_ids and inputs_embeds are given; give either input_ids or inputs_embeds")
        elif pixel_values is not None:
            raise ValueError(
                "pixel_values need input_ids, which hold their places; leave them out if inputs_embeds hold their features"
            )
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(self, input_ids_BS: torch.Tensor, pixels_F3PP: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [B, S, H] with the visual tokens in their places."""
        visual_BS = self._is_visual(input_ids_BS)
        embeddings_BSH = self.get_input_embeddings()(input_ids_BS.masked_fill(visual_BS, 0))
        if pixels_F3PP is None:
            # The model itself writes no visual token: their ids lie beyond its vocabulary.
            if visual_BS.any():
                raise ValueError(
                    f"input_ids hold {int(visual_BS.sum())} visual tokens but there are no pixel_values; give the processor's"
                )
            return embeddings_BSH
        tokens = len(pixels_F3PP) * self.config.tokens_per_frame
        if int(visual_BS.sum()) != tokens:
            raise ValueError(
                f"input_ids hold {int(visual_BS.sum())} visual tokens, but pixel_values hold {len(pixels_F3PP)} pictures of "
                f"{self.config.tokens_per_frame} tokens, which makes {tokens}; use the processor of this model for both"
            )
        features_FTH = self.get_image_features(pixels_F3PP).to(embeddings_BSH.device, embeddings_BSH.dtype)
        return embeddings_BSH.masked_scatter(visual_BS[..., None], features_FTH)

    def _is_visual(self, input_ids_BS: torch.Tensor) -> torch.Tensor:
        return (input_ids_BS == self.config.image_token_id) | (input_ids_BS == self.config.video_token_id)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat prompts for several answers each. The pictures of a prompt are repeated together, not one by one."""
        pixels_F3PP = model_kwargs.pop("pixel_values", None)
        if pixels_F3PP is not None and input_ids is not None and expand_size > 1:
            counts = (self._is_visual(input_ids).sum(dim=1) // self.config.tokens_per_frame).tolist()
            pixels_F3PP = torch.cat([part for part in pixels_F3PP.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs  # type: ignore[arg-type]
        )
        if pixels_F3PP is not None:
            model_kwargs["pixel_values"] = pixels_F3PP
        return input_ids, model_kwargs


def local_folder(path: str | os.PathLike) -> Path:
    """``path``, which must be a local folder. Raises ``FileNotFoundError`` if it is not."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{os.fspath(path)} is not a folder; download a model first (hf download NAME --local-dir FOLDER) and give its folder"
        )
    return folder

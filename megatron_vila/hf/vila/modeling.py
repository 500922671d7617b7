"""VILA as a transformers model: our vision tower and projector in front of transformers' own Llama or Qwen2.

Tower and projector are the modules of training, so they give the same features. The language model is that of transformers,
with its KV cache, its attention kernels and its ``generate``. As in LLaVA, ``VILAModel`` is everything but the output layer. In
files, the weights have the names of the flat layout: ``llm.*``, ``vision_tower.vision_model.*``, ``mm_projector.layers.*``.

Legend: B sequences, S tokens of a sequence, F pictures (images and video frames of all sequences, in order), P pixels of a
side, T tokens of a picture, H width of the language model, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    GenerationConfig,
    GenerationMixin,
    LlamaModel,
    PreTrainedModel,
    Qwen2Model,
    SiglipVisionConfig,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from megatron_vila.hf.vila.configuration import VilaConfig
from megatron_vila.hf.vila.token_embedding import TokenEmbedding, is_marked, is_visual, masked_labels
from megatron_vila.hf.vila.tower import VilaVisionTower, takes_part
from megatron_vila.hf.vila.weights import read_weights
from megatron_vila.models.vision.no_frames import zero_connected_to
from megatron_vila.models.vision.projector import Projector
from megatron_vila.models.vision.tower import in_frame_micro_batches

_LANGUAGE_MODELS = {"llama": LlamaModel, "qwen2": Qwen2Model}
_IN_FILES: dict[str, list[WeightConverter | WeightRenaming]] = {
    "VILAModel": [WeightRenaming(r"^llm\.model\.", "language_model.")],
    "vila": [
        WeightRenaming(r"^llm\.lm_head\.", "lm_head."),
        WeightRenaming(r"^llm\.", "model.llm."),
        WeightRenaming(r"^vision_tower\.", "model.vision_tower."),
        WeightRenaming(r"^mm_projector\.", "model.mm_projector."),
    ],
}
"""Names of the weights in files, and here; those of ``VILAModel`` also within the other one."""
for _name, _renamings in _IN_FILES.items():
    register_checkpoint_conversion_mapping(_name, _renamings, overwrite=True)


class VILAPreTrainedModel(PreTrainedModel):
    """What ``VILAModel`` and ``VILAForConditionalGeneration`` share. One that is made from a configuration has random weights."""

    config_class = VilaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["VilaVisionTower", "Projector"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": SiglipEncoderLayer, "attentions": SiglipAttention}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        config: VilaConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a folder of either layout; keywords as in transformers (``dtype``, ``device_map``, ``attn_implementation``, ...).

        Raises ``ConversionError`` listing every tensor that is missing, extra or of another shape, and files that are damaged
        or pickled; ``FileNotFoundError`` for a path that is no local folder.
        """
        if pretrained_model_name_or_path is None:  # with the keywords config and state_dict
            return super().from_pretrained(None, *args, config=config, **kwargs)
        folder = local_folder(pretrained_model_name_or_path)
        if config is None:
            # "auto" means nothing to a configuration, which says how the weights are stored.
            dtypes: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
            config, kwargs = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
            kwargs |= dtypes
        saved = config.architectures or []
        tensors = read_weights(folder, config.model_settings, output_layer="VILAModel" not in (cls.__name__, *saved))
        if kwargs.get("device_map") is not None:
            kwargs.setdefault("offload_buffers", True)  # those that are carried
            if config.tie_word_embeddings and cls is not VILAModel:
                # accelerate looks for each weight that is left on the disk under its own name.
                tensors["llm.lm_head.weight"] = tensors["llm.model.embed_tokens.weight"]
        # transformers takes no folder together with tensors, so the generation settings in the folder are read here.
        result = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.name_or_path = model.config.name_or_path = str(folder)
        if kwargs.get("generation_config") is None and model.can_generate():
            for place in (folder, folder / "llm"):
                if (place / "generation_config.json").is_file():
                    model.generation_config = GenerationConfig.from_pretrained(place)
                    break
        return result


class VILAModel(VILAPreTrainedModel):
    """Vision tower, projector and the language model without its output layer."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        text, ours = config.get_text_config(), config.model_settings
        std = text.initializer_range
        self.vision_tower = VilaVisionTower(ours.vision, std, cast(SiglipVisionConfig, config.vision_config))
        self.mm_projector = Projector(ours.projector, ours.vision, text.hidden_size, std)
        self.language_model = _LANGUAGE_MODELS[text.model_type](text)
        self.set_input_embeddings(self.language_model.get_input_embeddings())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(TokenEmbedding.of(value))

    @capture_outputs(tie_last_hidden_states=False)
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Features of pictures [F, 3, P, P], images or video frames, as uint8 or as the processor's floats.

        ``pooler_output`` [F, T, H] are the projected tokens, ``last_hidden_state`` the tower's features of the patches, [F,
        patches, C]. ``output_hidden_states`` and ``output_attentions`` are those of the tower.
        """
        names = [f"output_{name}" for name in self._can_record_outputs]
        # What is recorded of each layer is not put together from parts.
        whole = any(kwargs.get(name, getattr(self.config, name, False)) for name in names)
        features_FNC = self._encode(self.vision_tower, pixel_values, whole)
        return BaseModelOutputWithPooling(last_hidden_state=features_FNC, pooler_output=self.mm_projector(features_FNC))

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As ``get_image_features``, of the frames [F, 3, P, P] of one video or several, or of N videos [N, F, 3, P, P]: then
        ``pooler_output`` is [N, F, T, H], and ``last_hidden_state`` stays [N * F, patches, C]."""
        several = pixel_values_videos.dim() == 5
        output = self.get_image_features(pixel_values_videos.flatten(end_dim=1) if several else pixel_values_videos, **kwargs)
        if several and isinstance(output, BaseModelOutputWithPooling) and output.pooler_output is not None:
            output.pooler_output = output.pooler_output.unflatten(0, pixel_values_videos.shape[:2])
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: Mapping[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Hidden states [B, S, H] of the language model, and its cache.

        ``input_ids`` int64 [B, S] hold ``image_token_id`` or ``video_token_id`` in the places of visual tokens, ``pixel_values``
        [F, 3, P, P] the pictures in the order of their places. ``inputs_embeds`` [B, S, H] that ``get_input_embeddings()`` made
        of such ids have marks in these places. ``mm_encoder_outputs`` may have the output of ``get_image_features`` under
        ``image``, in place of ``pixel_values``. Raises ``ValueError`` if the number of places is not that of the pictures'
        tokens, unless exactly one of ``input_ids`` and ``inputs_embeds`` is given, and for what another model's processor made.

        Without pictures, a blank one is encoded and changes nothing, if tower and projector are trained or sharded: then ranks
        without pictures must run them as those with pictures do.
        """
        if foreign := [name for name in kwargs if name.startswith(("pixel_", "image_", "video_"))]:
            raise ValueError(
                f"the model got {', '.join(foreign)}, which the processor of another model makes; use that of this model "
                "(AutoProcessor.from_pretrained of its folder)"
            )
        if input_ids is not None and inputs_embeds is None:
            visual_BS = is_visual(input_ids)
            if _starts(past_key_values):
                self._check_ids(input_ids.masked_fill(visual_BS, 0))
            # PEFT puts modules of its own in place of the table, which look up every id.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(visual_BS, 0))
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("both or neither of input_ids and inputs_embeds are given; give either input_ids or inputs_embeds")
        else:
            visual_BS = is_marked(inputs_embeds)
            if pixel_values is not None and not visual_BS.any():
                raise ValueError(
                    "pixel_values need input_ids, or inputs_embeds that get_input_embeddings() made of them, with the places of "
                    "pictures; leave pixel_values out if inputs_embeds hold the pictures' features"
                )
        if mm_encoder_outputs is not None:
            if pixel_values is not None:
                raise ValueError("pixel_values and mm_encoder_outputs are both given; give pictures or their features")
            tokens_FTH = mm_encoder_outputs["image"].pooler_output
            inputs_embeds = _with_features(inputs_embeds, visual_BS, cast(torch.Tensor, tokens_FTH))
        else:
            inputs_embeds, tokens_FTH = self._with_pictures(inputs_embeds, visual_BS, pixel_values, past_key_values)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return LlavaModelOutputWithPast(**outputs, image_hidden_states=tokens_FTH)

    def _check_ids(self, ids_BS: torch.Tensor) -> None:
        rows, highest = self.config.get_text_config().vocab_size, int(ids_BS.max()) if ids_BS.numel() else 0
        if highest >= rows:
            raise ValueError(
                f"input_ids hold the token {highest}, but the model has vocab_size={rows}; use the processor of this model, and "
                "model.resize_token_embeddings(len(processor.tokenizer)) after adding tokens to its tokenizer"
            )

    def _with_pictures(
        self, embeddings_BSH: torch.Tensor, visual_BS: torch.Tensor, pixels_F3PP: torch.Tensor | None, cache: Any | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings with the pictures' tokens in their places, and these tokens [F, T, H]."""
        places = int(visual_BS.sum())
        if pixels_F3PP is None:
            # The model itself writes no visual token: their ids lie beyond its vocabulary.
            if places:
                raise ValueError(f"input_ids hold {places} visual tokens but there are no pixel_values; give the processor's")
            if (torch.is_grad_enabled() or _starts(cache)) and takes_part(self.vision_tower, self.mm_projector):
                size = self.config.vision_config.image_size
                blank = torch.zeros(1, 3, size, size, device=embeddings_BSH.device)
                embeddings_BSH = embeddings_BSH + zero_connected_to([self._tokens(blank)]).to(embeddings_BSH)
            return embeddings_BSH, None
        tokens = len(pixels_F3PP) * self.mm_projector.num_tokens
        if places != tokens:
            raise ValueError(
                f"input_ids hold {places} visual tokens, but pixel_values hold {len(pixels_F3PP)} pictures of "
                f"{self.mm_projector.num_tokens} tokens, which makes {tokens}; use the processor of this model for both"
            )
        tokens_FTH = self._tokens(pixels_F3PP).to(embeddings_BSH)
        return embeddings_BSH.masked_scatter(visual_BS[..., None], tokens_FTH), tokens_FTH

    def _tokens(self, pixels_F3PP: torch.Tensor) -> torch.Tensor:
        """Projected tokens [F, T, H]; the patch features of all pictures need not exist at once."""
        return self._encode(lambda part_F3PP: self.mm_projector(self.vision_tower(part_F3PP)), pixels_F3PP)

    def _encode(
        self, encode: Callable[[torch.Tensor], torch.Tensor], pixels_F3PP: torch.Tensor, whole: bool = False
    ) -> torch.Tensor:
        """``encode`` in parts, or at once if ranks with other numbers of pictures must run it equally often."""
        if whole or takes_part(self.vision_tower, self.mm_projector):
            return encode(pixels_F3PP)
        return in_frame_micro_batches(self.vision_tower, encode, pixels_F3PP)


class VILAForConditionalGeneration(VILAPreTrainedModel, GenerationMixin):
    """A VILA that takes token ids with places for visual tokens, and the pictures that fill these places.

    ``VilaProcessor`` makes both.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VilaConfig) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.model = VILAModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See ``VILAModel``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See ``VILAModel``."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits [B, S, V] and, with ``labels`` int64 [B, S], the loss; inputs and errors as those of ``VILAModel``.

        Visual tokens in ``labels``, as in a copy of ``input_ids``, count as -100: nothing is learned of them.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=masked_labels(labels), vocab_size=vocabulary, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs: Any) -> dict[str, Any]:
        """As in transformers. Pictures are passed on exactly where the model's inputs hold their places: in the prefill of an
        assistant too, and of a prompt whose beginning is in the cache those behind it."""
        pixels_F3PP = kwargs.pop("pixel_values", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if pixels_F3PP is None:
            return inputs
        if inputs.get("input_ids") is None:
            return inputs | {"pixel_values": pixels_F3PP}
        of_prompt, here = (is_visual(ids).sum(dim=1) // self.config.tokens_per_frame for ids in (input_ids, inputs["input_ids"]))
        if here.any():
            parts = zip(pixels_F3PP.split(of_prompt.tolist()), here.tolist(), strict=True)
            inputs["pixel_values"] = torch.cat([part[len(part) - count :] for part, count in parts])
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Repeat prompts for several answers each. The pictures of a prompt are repeated together, not one by one."""
        pixels_F3PP = model_kwargs.pop("pixel_values", None)
        if pixels_F3PP is not None and expand_size > 1:
            embeddings = model_kwargs.get("inputs_embeds")
            visual_BS = is_visual(cast(torch.Tensor, input_ids)) if embeddings is None else is_marked(embeddings)
            counts = (visual_BS.sum(dim=1) // self.config.tokens_per_frame).tolist()
            pixels_F3PP = torch.cat([part for part in pixels_F3PP.split(counts) for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs  # type: ignore[arg-type]
        )
        if pixels_F3PP is not None:
            model_kwargs["pixel_values"] = pixels_F3PP
        return input_ids, model_kwargs


def _with_features(embeddings_BSH: torch.Tensor, visual_BS: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings with the tokens [..., H] of pictures in their places. Raises ``ValueError`` if these are not as many."""
    places, made = int(visual_BS.sum()), tokens[..., 0].numel()
    if places != made:
        raise ValueError(
            f"input_ids hold {places} visual tokens, but mm_encoder_outputs hold {made}; give the output of get_image_features "
            "for all pictures"
        )
    return embeddings_BSH.masked_scatter(visual_BS[..., None], tokens.to(embeddings_BSH))


def _starts(cache: Any | None) -> bool:
    """Whether a sequence begins here, rather than going on with one token after the other."""
    return cache is None or cache.get_seq_length() == 0


def local_folder(path: str | os.PathLike) -> Path:
    """``path``, which must be a local folder. Raises ``FileNotFoundError`` if it is not."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{os.fspath(path)} is not a folder; download a model first (hf download NAME --local-dir FOLDER) and give its folder"
        )
    return folder

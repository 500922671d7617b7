"""Turns text, images and videos into the inputs of the model, exactly as training does.

Media are placed in a conversation by the rule of the training run. The tokenizer's chat template renders it; the text is cut at
the markers, and each piece is tokenized on its own. Pictures are decoded, sampled and resized by the functions of the training
data. The separators after pictures are those of the training run. So a sample gets the same token ids and pixels as in training.

Legend: B texts, S tokens with padding, F pictures of all texts in order, P pixels of a side.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from megatron_vila.config.text_rules import DEFAULT_CLOCK, TextRules
from megatron_vila.convert.hf_config import SEPARATORS
from megatron_vila.convert.tokenizer import separator_ids, suggest_template
from megatron_vila.data.chat import Segment, assemble, own_start
from megatron_vila.data.control_tokens import control_tokens
from megatron_vila.data.images import preprocess
from megatron_vila.data.placement import IMAGE, MARKER, VIDEO, Turn, place_media
from megatron_vila.data.signs import MEDIUM, markers_of, with_signs, without_signs
from megatron_vila.data.template import NAMED, render, with_clock
from megatron_vila.hf.vila.call_options import CallOptions
from megatron_vila.hf.vila.chat_parts import reads, walks_over_parts, with_parts
from megatron_vila.hf.vila.configuration import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VilaConfig, VilaConfigError
from megatron_vila.hf.vila.given_media import (
    in_place_of_none,
    is_empty,
    is_image,
    is_video,
    of_each_conversation,
    of_each_text,
    read_frames,
    read_picture,
    text_and_media,
)
from megatron_vila.hf.vila.inputs import VilaInputs
from megatron_vila.hf.vila.modeling import local_folder
from megatron_vila.models.vision.tower import scale_pixels
from megatron_vila.plan.pictures import Squares, Unit
from megatron_vila.plan.row import Document, references

_logger = logging.getLogger(__name__)


class ChatText(str):
    """A rendered conversation. Its attribute ``signed`` keeps which control tokens in it are only text.

    A copy that is a plain ``str`` does not have it, and all control tokens in one are read as tokens.
    """

    signed: str

    @classmethod
    def of(cls, signed: str, shown: str) -> ChatText:
        """The text ``shown``, whose text with signs is ``signed``."""
        made = cls(shown)
        made.signed = signed
        return made


class VilaProcessor(ProcessorMixin):
    """Makes ``input_ids``, ``attention_mask`` and ``pixel_values`` of texts with images and videos.

    The arguments are the model's settings (see ``VilaConfig``); ``from_pretrained`` reads them from a model's folder.
    ``num_frames`` and ``fps`` say how many frames of a video are taken by default, ``fps_rule`` which ones (``sampling.py``).
    ``media_format``, ``template``, ``template_clock`` and ``parse_control_tokens`` are the ``TextRules`` of training; their
    defaults are those of processors that were saved without them.
    """

    image_token, video_token = IMAGE, VIDEO

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        tokens_per_frame: int,
        image_separator_ids: Sequence[int],
        frame_separator_ids: Sequence[int],
        num_frames: int,
        fps: float,
        image_aspect: str,
        max_positions: int,
        media_format: str = "verbatim",
        template: str = "",
        template_clock: str = DEFAULT_CLOCK,
        parse_control_tokens: bool = True,
        fps_rule: str = "spread",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or NAMED.get(template) or tokenizer.chat_template)
        self.image_size, self.tokens_per_frame = image_size, tokens_per_frame
        self.image_token_id, self.video_token_id = IMAGE_TOKEN_ID, VIDEO_TOKEN_ID
        self.image_separator_ids, self.frame_separator_ids = list(image_separator_ids), list(frame_separator_ids)
        self.num_frames, self.fps = num_frames, fps
        self.image_aspect, self.max_positions = image_aspect, max_positions
        self.media_format, self.template, self.template_clock = media_format, template, template_clock
        self.parse_control_tokens, self.fps_rule = parse_control_tokens, fps_rule

    @classmethod
    def from_config(cls, config: VilaConfig, tokenizer: PreTrainedTokenizerBase, **given: Any) -> VilaProcessor:
        """The processor of a model; ``given`` arguments of the class win over those of ``config``.

        If ``config`` has no separator ids or no prompt, as in published VILA files, they are chosen by the tokenizer as at an
        import, and logged.
        """
        settings = {
            "image_size": config.model_settings.vision.image_size,
            "tokens_per_frame": config.tokens_per_frame,
            **{name: value for name, value in config.megatron_vila.items() if name in _ARGUMENTS},
            **given,
        }
        for name in SEPARATORS:
            if settings[name] is None:
                settings[name] = separator_ids(tokenizer, name, config.separator_text(name))
        if settings["template"] is None:
            settings["template"] = suggest_template(tokenizer)
        return cls(tokenizer, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> VilaProcessor:
        """From a model's folder of either layout, or a folder that ``save_pretrained`` wrote.

        Settings of the processor may be given as keywords (``num_frames=64``); other keywords are the tokenizer's. Raises
        ``FileNotFoundError`` for a path that is not a local folder, and for a folder that has neither config.json nor
        processor_config.json, ``VilaConfigError`` for the tokenizer of another model.
        """
        folder, config = local_folder(pretrained_model_name_or_path), None
        order = {key: kwargs[key] for key in ("projector_token_order",) if key in kwargs}
        if (folder / "config.json").is_file():
            config = AutoConfig.from_pretrained(folder, **order)
        given = {name: kwargs[name] for name in _ARGUMENTS & kwargs.keys()}
        tokenizer = _tokenizer(folder, config, {name: value for name, value in kwargs.items() if name not in (*given, *order)})
        if config is not None:
            _check_tokenizer(tokenizer, config, folder)
        if not (folder / "processor_config.json").is_file():
            if config is None:
                raise FileNotFoundError(f"{folder} has no config.json and no processor_config.json; give the folder of a model")
            return cls.from_config(config, tokenizer, **given)
        settings, _ = cls.get_processor_dict(folder)
        settings = {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}
        if "template" in given:
            settings.pop("chat_template", None)
        return cls(tokenizer, **{**settings, **given})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Any,
    ) -> VilaInputs:
        """Inputs of the model for one text or several.

        ``text`` is what ``apply_chat_template`` returns. In it ``<image>`` and ``<video>`` mark the places of media; with a
        backslash in front they are plain words. If only videos are given, ``<image>`` marks the place of a video too.

        ``images`` are paths, PIL pictures or uint8 arrays [H, W, 3] or [3, H, W]. ``videos`` are paths of video files, of which
        ``num_frames`` frames are taken (or at most ``fps`` a second), or frames (lists of pictures, uint8 arrays [N, H, W, 3] or
        [N, 3, H, W]), which are all taken. Media come in the order of their markers, in one list for all texts or a list for
        each text.

        ``options`` are those of ``CallOptions``, also in the groups of transformers (``videos_kwargs={"num_frames": 8}``).

        Returns int64 ``input_ids`` and ``attention_mask`` [B, S], padded on the left unless ``padding_side`` says otherwise, and
        float32 ``pixel_values`` [F, 3, P, P] if there are pictures. Raises ``MediaError`` for a file that cannot be read,
        ``ValueError`` for media that do not fit the markers, for texts of different lengths without ``padding``, for a
        ``truncation`` that would cut visual tokens and for other values of options, ``TypeError`` for other keywords.
        """
        asked = CallOptions.of("the processor", options)
        if text is None:
            raise ValueError("text=None: give text, in which markers stand for the media")
        texts = [
            one.signed if isinstance(one, ChatText) else with_signs(one)
            for one in ([text] if isinstance(text, str) else text)
        ]
        fps = self.fps if asked.fps is None else asked.fps
        frames = (asked.num_frames or self.num_frames, fps, self.fps_rule, asked.do_sample_frames)
        only_videos = videos is not None and is_empty(images)
        kinds = [[VIDEO if only_videos else marker for marker in markers_of(one)] for one in texts]
        images_of = of_each_text(images, [markers.count(IMAGE) for markers in kinds], is_image, IMAGE)
        videos_of = of_each_text(videos, [markers.count(VIDEO) for markers in kinds], is_video, VIDEO)
        rows, pictures = [], []
        for one, markers, own_images, own_videos in zip(texts, kinds, images_of, videos_of, strict=True):
            queues = {IMAGE: iter(own_images), VIDEO: iter(own_videos)}
            media = [read_frames(next(queues[m]), *frames) if m == VIDEO else [read_picture(next(queues[m]))] for m in markers]
            rows.append(self._token_ids(one, [(m == VIDEO, len(p)) for m, p in zip(markers, media, strict=True)]))
            pictures += [preprocess(own, self.image_size, self.image_aspect) for own in media]
        inputs = self._pad([self._cut(row, asked) for row in rows], asked)
        if pictures:
            inputs["pixel_values"] = scale_pixels(torch.cat(pictures))
        return VilaInputs(inputs)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        chat_template: str | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        """Place the media of one conversation or several, render it with the chat template, and with ``tokenize`` process it.

        The content of a message is text, or a list of parts: ``{"type": "text", "text": ...}``, ``{"type": "image", "image":
        path, picture or array}``, ``{"type": "video", "video": path or frames}`` (a file may be under ``path`` or ``url`` too;
        parts of the type ``image_url`` are read). A part without its medium stands for the next one in ``images`` or ``videos``.
        In a conversation with image or video parts, a marker in a text is a plain word. Media of texts with markers are given as
        ``images`` and ``videos``: lists for one conversation, a list of lists for several. Without ``tokenize`` they may instead
        be given to the call that processes the text; then every marker stands for one medium. ``media_format`` is the rule by
        which media are placed. A template that walks over the parts of a content gets the text of a message as its one part.

        Of the further keywords those that the template reads are its own, all others are options of the processor's call, which
        ``processor_kwargs`` may hold too. Without ``tokenize`` they are checked, and wait for the call that processes the text.

        Returns text without ``tokenize``, ``input_ids`` with it, and with ``return_dict`` as well all inputs of the model.
        Raises ``ValueError`` for media that do not fit the markers and a template that writes nothing of a message,
        ``TypeError`` for a keyword that nobody reads.
        """
        several = not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if several else [conversation]
        given = [
            of_each_conversation(media, is_one, several, len(conversations))
            for media, is_one in ((images, is_image), (videos, is_video))
        ]
        placed = [
            self._place(one, pictures, clips, known=tokenize or images is not None or videos is not None)
            for one, pictures, clips in zip(conversations, *given, strict=True)
        ]
        if tokenize and any(medium is None for _, *media in placed for own in media for medium in own):
            raise ValueError("a part of a message names no image or no video; give it under its key, or in images or videos")
        known = self.chat_template if isinstance(self.chat_template, Mapping) else {"default": self.chat_template}
        template = self.tokenizer.get_chat_template(known.get(chat_template or "default", chat_template), tools)
        own = reads(template)
        template_arguments = {name: value for name, value in more.items() if name in own}
        template_arguments |= {name: value for name, value in (("tools", tools), ("documents", documents)) if value is not None}
        options = {name: value for name, value in more.items() if name not in own}
        if twice := options.keys() & (processor_kwargs or {}).keys():
            raise TypeError(f"apply_chat_template got {', '.join(sorted(twice))} in processor_kwargs and beside it; give it once")
        options |= processor_kwargs or {}
        CallOptions.of("apply_chat_template", options)
        by_parts = walks_over_parts(self.tokenizer, template)
        template = with_clock(template, self.template_clock)
        control = control_tokens(self.tokenizer)
        if not self.parse_control_tokens:
            for name in template_arguments.keys() & {"tools", "documents"}:
                template_arguments[name] = control.mark(template_arguments[name])
        signed = [
            render(
                self.tokenizer,
                template,
                messages if self.parse_control_tokens else control.mark(messages),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **template_arguments,
            )
            for messages in (with_parts(messages) if by_parts else messages for messages, _, _ in placed)
        ]
        texts = [ChatText.of(text, control.shown(without_signs(text))) for text in signed]
        if not tokenize:
            return texts if several else texts[0]
        inputs = self(
            [images for _, images, _ in placed],
            texts,
            [videos for _, _, videos in placed],
            **options,
        )
        return inputs if return_dict else inputs["input_ids"]

    def _place(
        self, messages: Sequence[Mapping[str, Any]], images: list[Any], videos: list[Any], known: bool
    ) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
        """Messages with signs in the places of media, and the media. Unless these are ``known``, markers give their number."""
        contents, *in_parts = text_and_media(messages)
        if any(in_parts):
            images, videos = (in_place_of_none(own, media) for own, media in zip(in_parts, (images, videos), strict=True))
        counts = [len(images), len(videos)]
        turns = [Turn(message["role"], content) for message, content in zip(messages, contents, strict=True)]
        if not known and not any(in_parts):
            markers = [marker for turn in turns if turn.role == "user" for marker in MARKER.findall(turn.text)]
            counts = [markers.count(IMAGE), markers.count(VIDEO)]
        placed, _ = place_media(turns, counts[0], counts[1], self.media_format)
        rendered = [
            {**message, "content": with_signs(turn.text) if turn.role == "user" else turn.text}
            if message.get("content") is not None
            else dict(message)
            for message, turn in zip(messages, placed, strict=True)
        ]
        return rendered, images, videos

    def _token_ids(self, text: str, media: Sequence[tuple[bool, int]]) -> np.ndarray:
        """Token ids of a signed text, with the media's ids in visual places.

        ``media`` has for each marker whether it is a video, and its number of pictures.
        """
        control = control_tokens(self.tokenizer)
        pieces = [control.encode(piece)[0] if piece else np.zeros(0, dtype=np.int64) for piece in MEDIUM.split(text)]
        pieces[0] = np.concatenate([own_start(self.tokenizer, TextRules.of(self)), pieces[0]])
        segments = [Segment(ids, np.zeros(len(ids), dtype=bool)) for ids in pieces]
        kind = Squares(Unit(frames=1, tiles=1, tokens=self.tokens_per_frame, cost=1))
        pictures = [references("", range(count), video, kind.units(count, video)) for video, count in media]
        document: Document = assemble(segments, pictures, self.image_separator_ids, self.frame_separator_ids, "")
        token_ids = document.token_ids
        for frame, start in zip(document.frames, document.frame_starts, strict=True):
            token_ids[start : start + frame.tokens] = self.video_token_id if frame.is_video else self.image_token_id
        if len(token_ids) > self.max_positions:
            _logger.warning(
                "a prompt of %d tokens is longer than the %d that the model was trained for; take fewer frames (num_frames)",
                len(token_ids),
                self.max_positions,
            )
        return token_ids

    def _cut(self, row: np.ndarray, asked: CallOptions) -> np.ndarray:
        """``row`` without the tokens beyond ``max_length``, at the side where the tokenizer cuts."""
        most = asked.max_length
        if not asked.truncates or most is None or len(row) <= most:
            return row
        at_left = self.tokenizer.truncation_side == "left"
        kept, lost = (row[-most:], row[:-most]) if at_left else np.split(row, [most])
        if np.isin(lost, [self.image_token_id, self.video_token_id]).any():
            raise ValueError(
                f"max_length={asked.max_length} would cut visual tokens from a text of {len(row)} tokens; take fewer frames "
                "(num_frames), or give a larger max_length"
            )
        return kept

    def _pad(self, rows: Sequence[np.ndarray], asked: CallOptions) -> dict[str, torch.Tensor]:
        longest = max(map(len, rows))
        if not asked.pads_to and any(len(row) != longest for row in rows):
            raise ValueError("texts of different lengths do not fit in one tensor with padding=False; set padding=True")
        width = max(longest, (asked.max_length or 0) if asked.pads_to == "max_length" else 0)
        width = width if not asked.pads_to else -(-width // (asked.pad_to_multiple_of or 1)) * (asked.pad_to_multiple_of or 1)
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        input_ids = torch.full((len(rows), width), next(i for i in known if i is not None), dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for place, row in enumerate(rows):
            start = 0 if asked.padding_side == "right" else width - len(row)
            input_ids[place, start : start + len(row)] = torch.from_numpy(row)
            attention_mask[place, start : start + len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}


# Keys of a processor's file that are no settings of this class, or are the same for all.
_NOT_SETTINGS = ("processor_class", "auto_map", "image_token_id", "video_token_id")
_ARGUMENTS = inspect.signature(VilaProcessor.__init__).parameters.keys() - {"self", "tokenizer"}


def _tokenizer(folder: Path, config: VilaConfig | None, given: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer at the root of a model's folder, else that in ``llm/``, where the VILA code keeps it."""
    given = {**given, "trust_remote_code": False, "local_files_only": True}
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return AutoTokenizer.from_pretrained(folder, config=config, **given)
    return AutoTokenizer.from_pretrained(folder / "llm", config=config and config.text_config, **given)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: VilaConfig, folder: Path) -> None:
    """Raise ``VilaConfigError`` if the model in ``folder`` has fewer embeddings than the tokenizer has tokens of its own.

    Those that are added to it may lie behind the table, as VILA's ``<image>``.
    """
    rows = config.get_text_config().vocab_size
    if tokenizer.vocab_size > rows:
        raise VilaConfigError(
            [
                f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the language model has vocab_size={rows}: it "
                "belongs to another model; put the model's own tokenizer there"
            ]
        )

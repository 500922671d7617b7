"""Texts that are trained as a whole, with or without media: plain text, captions, and pictures among text (MMC4, OBELICS).

Such a record becomes one turn of the role ``document``. ``{"text": ...}`` may hold markers for the media of the record; without
any, the media stand before the text. That is also what a caption is: a text behind its medium.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vila.data.addresses import AddressError, bytes_of_base64
from megatron_vila.data.fields import Media, RecordError, check_text, lists_media, read_fields, shown, source
from megatron_vila.data.formats.draft import Draft
from megatron_vila.data.formats.unfit import refuse_unfit
from megatron_vila.data.placement import DOCUMENT, IMAGE, Turn, escape

WRITTEN = ("text", "caption")
"""Fields that hold the text of a document as it is written."""

INTERLEAVED = ("text_list", "texts")
"""Fields that hold text with its media at their places: of MMC4, of OBELICS."""

_BETWEEN_TEXTS = "\n\n"


def read_text(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """Plain text or a caption: ``content[field]`` with the media of the record."""
    here = f"{where}, field '{field}'"
    text = _text(content[field], here)
    # Beside a medium, "url" says where it came from; alone it may be the medium, which would be overlooked.
    images, videos = _media_beside(content, (field, "url") if lists_media(content) else (field,), here, where, media_dir)
    if field == "caption" and not images and not videos:
        raise RecordError(f"{here}: a caption needs its 'image' or 'video'; text without media belongs in 'text'")
    return Draft((Turn(DOCUMENT, text),), images, videos)


def read_sentences(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """A document of MMC4: the sentences ``text_list``, each image of ``image_info`` before its sentence.

    As VILA joins them: a space between sentences, none beside an image.
    """
    here = f"{where}, field '{field}'"
    sentences = [_text(one, f"{here}, sentence {n}", empty=True) for n, one in enumerate(_list(content[field], here), start=1)]
    _refuse_media_beside(content, (field, "image_info", "url"), here, where, media_dir)
    before: list[list[Media]] = [[] for _ in sentences]
    here = f"{where}, field 'image_info'"
    for number, info in enumerate(_list(content.get("image_info") or [], here), start=1):
        place, image = _placed_image(info, len(sentences), f"{here}, image {number}", media_dir)
        before[place].append(image)
    text = ""
    for sentence, images in zip(sentences, before, strict=True):
        words = escape(sentence)
        text += IMAGE * len(images) + words.removeprefix(" ") if images else (" " if text else "") + words
    return _document(text, [image for images in before for image in images], f"{where}, field '{field}'")


def read_blocks(content: Mapping[str, Any], field: str, where: str, media_dir: str) -> Draft:
    """A document of OBELICS: ``texts`` and ``images`` are lists of one length, and at each place one of the two is something."""
    here = f"{where}, field '{field}'"
    texts, images = _list(content[field], here), _list(content.get("images") or [], f"{where}, field 'images'")
    _refuse_media_beside(content, (field, "images", "metadata", "general_metadata"), here, where, media_dir)
    if len(texts) != len(images):
        raise RecordError(f"{here}: {len(texts)} texts and {len(images)} images; both lists have one entry for each block")
    pieces, media = [""], []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), start=1):
        place = f"{where}, block {number}"
        if (text is None) == (image is None):
            raise RecordError(f"{place}: must have a text or an image, and null for the other")
        if image is not None:
            media.append(Media(source(image, f"{place}, field 'images'", media_dir), False))
            pieces.append(IMAGE)
        else:
            words = escape(_text(text, f"{place}, field '{field}'", empty=True))
            pieces.append(words if pieces[-1] in ("", IMAGE) else _BETWEEN_TEXTS + words)
    return _document("".join(pieces), media, here)


def _media_beside(
    content: Mapping[str, Any], spoken: tuple[str, ...], here: str, where: str, media_dir: str
) -> tuple[list[Media], list[Media]]:
    """The images and videos of a record beside what its fields ``spoken`` say."""
    rest = {name: value for name, value in content.items() if name not in spoken}
    images, videos, system = read_fields(rest, where, media_dir)
    refuse_unfit(rest, where)
    if system is not None:
        raise RecordError(f"{here}: a text that is trained as a whole has no system turn; write a conversation, or leave it out")
    return images, videos


def _refuse_media_beside(content: Mapping[str, Any], spoken: tuple[str, ...], here: str, where: str, media_dir: str) -> None:
    if any(_media_beside(content, spoken, here, where, media_dir)):
        raise RecordError(f"{here}: the record has media beside those of its text, and no place for them")


def _document(text: str, images: Sequence[Media], where: str) -> Draft:
    if not text.replace(IMAGE, "").strip():
        raise RecordError(f"{where}: holds no text to learn")
    return Draft((Turn(DOCUMENT, text),), images, ())


def _placed_image(info: Any, sentences: int, where: str, media_dir: str) -> tuple[int, Media]:
    """The sentence before which an image of MMC4 stands, and the image."""
    if not isinstance(info, dict):
        raise RecordError(f"{where}: must be an object, found {shown(info)}")
    place = info.get("matched_text_index")
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < sentences:
        raise RecordError(
            f"{where}: 'matched_text_index' must be the number of a sentence, 0 to {sentences - 1}, found {shown(place)}"
        )
    if info.get("image_base64"):
        try:
            return place, Media(bytes_of_base64(info["image_base64"]), False)
        except AddressError as error:
            raise RecordError(f"{where}: 'image_base64' {error}") from error
    if not info.get("image_name"):
        raise RecordError(f"{where}: has no 'image_name' and no 'image_base64', and nothing is downloaded; found {shown(info)}")
    return place, Media(source(info["image_name"], f"{where}: 'image_name'", media_dir), False)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecordError(f"{where}: must be a list, found {shown(value)}")
    return value


def _text(value: Any, where: str, empty: bool = False) -> str:
    if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
        raise RecordError(f"{where}: is a list of token ids, which belong to one tokenizer; give the text")
    if not isinstance(value, str):
        raise RecordError(f"{where}: must be one text, found {shown(value)}")
    if not empty and not value.strip():
        raise RecordError(f"{where}: is empty, so nothing is learned; give the text, or leave the record out")
    check_text(value, where)
    return value

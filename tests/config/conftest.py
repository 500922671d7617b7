"""Fixtures of the tests that validate files."""

import json

import pytest


@pytest.fixture
def data_folder(tmp_path) -> list[str]:
    """Overrides that name files which exist."""
    samples, tokenizer, media = tmp_path / "train.json", tmp_path / "tokenizer", tmp_path / "media"
    samples.write_text(json.dumps([{"conversations": []}]))
    tokenizer.mkdir()
    media.mkdir()
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    return [
        f"data.train=[{samples}]",
        f"data.media_dir={media}",
        f"data.tokenizer={tokenizer}",
        f"train.output={tmp_path / 'runs' / 'new'}",
    ]

"""The README and the pages: links lead somewhere, named files, commands, presets and keys exist, examples are valid."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from megatron_vila.config.keys import config_keys
from megatron_vila.config.load import load_config, preset_names
from megatron_vila.data.formats.read import parse_record

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = ("model", "parallel", "data", "optim", "train", "checkpoint")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w./*-])(?:[\w.-]+/)+[\w.-]+\.(?:py|sh|yaml|md|png|txt)\b")
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+(?![a-z_0-9(])")

BRITISH = re.compile(
    r"colour|favour|honour|neighbour|behaviour|centre|centring|\bgrey|learnt|modelled|labelled|artefact|licence|defence"
    r"|(?:initial|normal|random|recogn|serial|token|summar|organ|optim|synchron|util|parallel|quant|real|minim|maxim)is(?:e|ing|ation)",
    re.IGNORECASE,
)
READ_BY_THE_MODEL = re.compile(r'"colour"|``colour``|"Which colour flashed')
"""The questions of the synthetic videos: another spelling gives other token ids, and other losses."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text()) if language in languages]


def code(page: Path) -> str:
    """Everything that stands in code, inline or fenced, line continuations joined."""
    text = page.read_text()
    fenced = "\n".join(block for _, block in FENCED.findall(text)).replace("\\\n", " ")
    return fenced + "\n" + "\n".join(INLINE.findall(FENCED.sub("", text)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_every_named_file_exists(page):
    for name in FILE.findall(code(page)):
        if not name.startswith(("runs/", "data/synthetic/")):
            assert any((base / name).is_file() for base in (ROOT, ROOT / "megatron_vila")), name


@pages
def test_every_named_test_exists(page):
    defined = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    for name in re.findall(r"(?<![\w/])test_\w+(?![\w.])", page.read_text()):
        assert name in defined, name


@pages
def test_every_named_folder_exists(page):
    for name in re.findall(r"`((?:megatron_vila|tests|tools|examples|docs)/(?:[\w-]+/)*)`", page.read_text()):
        assert (ROOT / name).is_dir(), name


@pages
def test_every_command_names_a_module_or_script_that_exists(page):
    text = code(page)
    for module in re.findall(r"-m (megatron_vila[\w.]*)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
    for script in re.findall(r"(?:bash|python|sbatch) (?:-\S+ )*([\w./]+\.(?:sh|py))\b", text):
        assert (ROOT / script).is_file(), script


@pages
def test_every_preset_of_a_command_exists(page):
    for name in re.findall(r"-m megatron_vila\.(?:train|explain) ([\w./-]+)", code(page)):
        assert name.endswith(".yaml") or name in preset_names() or name.isupper(), name


@pages
def test_every_key_exists(page):
    keys = {key.name for key in config_keys()}
    for name in KEY.findall(code(page)):
        assert name in keys or any(key.startswith(f"{name}.") for key in keys), name


@pages
def test_every_yaml_example_is_a_configuration(page, tmp_path):
    for block in blocks(page, "yaml"):
        file = tmp_path / "example.yaml"
        file.write_text(block)
        load_config(str(file))


@pages
def test_every_json_example_is_a_record(page):
    for block in blocks(page, "json"):
        parse_record(json.loads(block), str(page), "1", "")


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())}
        waiting += [t for t in targets if t.suffix == ".md" and t.is_file() and t not in reached]
    assert set(PAGES) <= reached


def test_code_and_pages_are_spelled_the_american_way():
    folders = ("megatron_vila", "benchmarks", "tools", "examples", "docs")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in {".py", ".sh", ".yaml", ".md"}]
    found = {
        f"{path.relative_to(ROOT)}:{number}": word[0]
        for path in [ROOT / "README.md", *files]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (word := BRITISH.search(READ_BY_THE_MODEL.sub("", line)))
    }
    assert found == {}


def test_the_two_commands_stand_in_the_readme():
    commands = "".join(blocks(ROOT / "README.md", "bash"))
    assert "bash examples/quickstart.sh\n" in commands
    assert "bash tests/run.sh\n" in commands


def test_the_five_numbers_of_the_readme_are_those_of_the_pages_they_link_to():
    table = (ROOT / "README.md").read_text().split("<!-- numbers -->")[1].split("<!-- /numbers -->")[0]
    rows = [line for line in table.splitlines() if "](" in line]
    assert len(rows) == 5
    for row in rows:
        path, _, anchor = LINK.findall(row)[0].partition("#")
        page = (ROOT / path).read_text()
        assert anchor in anchors(ROOT / path)
        for number in re.findall(r"\d[\d,.]*\d(?!\w)", row.split("](")[0]):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", page), f"{number} does not stand in {path}"


def test_the_pictures_are_small_and_drawn_by_the_code():
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "tools/draw_figures.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for name, draw in tool.PICTURES.items():
        size = (ROOT / "docs/images" / f"{name}.png").stat().st_size
        assert size < 200_000
        assert draw().axes

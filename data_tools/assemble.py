"""Parts -> shards: the tokens of all parts in order, without duplicates, cut into shards of equal length.

Which tokens a shard holds is arithmetic on the lengths of the parts, so that ranks and threads write shards in any order, and the
bytes depend on none of them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.parts import PartFolder, PartRecord, write_json
from data_tools.team import Team
from data_tools.tokenise import Options
from megarat.data.format import IntArray, Piece, Shard, named_errors, shard_from_json, shard_to_json, write_shard
from megarat.errors import UserError

_BUCKETS = 16  # documents are compared in this many groups by their digest: a bound on memory
_MOST_THREADS = 8  # a shard in the making takes some 400 MB

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Stream:
    """The documents of one side in their order, without the dropped ones: what its shards are cut from.

    Attributes:
        dropped: numbers of the documents to leave out, counted over all parts, sorted.
        first_documents: (parts + 1,) number of the first document of each part.
        first_tokens: (parts + 1,) place of the first kept token of each part.
    """

    side: str
    parts: PartFolder
    dropped: IntArray
    first_documents: IntArray
    first_tokens: IntArray

    @property
    def tokens(self) -> int:
        """Length of the stream."""
        return int(self.first_tokens[-1])

    @property
    def documents(self) -> int:
        """Documents kept."""
        return int(self.first_documents[-1]) - len(self.dropped)

    def read(self, start: int, stop: int) -> Piece:
        """The tokens start … stop - 1 and the ends of documents among them."""
        first, last = np.searchsorted(self.first_tokens, [start, stop], side="right") - 1
        pieces = []
        for part in range(int(first), min(int(last) + 1, len(self.first_tokens) - 1)):
            base, end = self.first_tokens[part : part + 2].tolist()
            if base < end and base < stop:  # parts may be empty, of a long document or of duplicates
                pieces.append(self._read_part(part, max(start - base, 0), min(stop, end) - base))
        ends = [piece.ends + shift for piece, shift in zip(pieces, _shifts(pieces), strict=True)]
        return Piece(np.concatenate([piece.tokens for piece in pieces]), np.concatenate(ends))

    def _read_part(self, part: int, start: int, stop: int) -> Piece:
        """The kept tokens start … stop - 1 of a part."""
        lengths = self.parts.read_documents(part, self.side)["length"]
        keep = self._kept(part)
        kept_ends, stored_ends = np.cumsum(np.where(keep, lengths, 0)), np.cumsum(lengths)
        first = int(np.searchsorted(kept_ends, start, side="right"))  # documents first … last hold what is asked for
        last = int(np.searchsorted(kept_ends, stop, side="left"))
        lengths, keep, kept_ends = lengths[first : last + 1], keep[first : last + 1], kept_ends[first : last + 1]
        tokens = self.parts.read_tokens(part, self.side, int(stored_ends[first] - lengths[0]), int(stored_ends[last]))
        if not keep.all():
            tokens = tokens[np.repeat(keep, lengths)]
        begin = int(kept_ends[0] - lengths[0])
        ends = kept_ends[keep]
        return Piece(tokens[start - begin : stop - begin], ends[(ends > start) & (ends <= stop)] - start)

    def _kept(self, part: int) -> BoolArray:
        first, last = self.first_documents[part : part + 2].tolist()
        keep = np.ones(last - first, dtype=bool)
        inside = np.searchsorted(self.dropped, [first, last])
        keep[self.dropped[inside[0] : inside[1]] - first] = False
        return keep


def _shifts(pieces: list[Piece]) -> Iterator[int]:
    return itertools.accumulate((len(piece.tokens) for piece in pieces[:-1]), initial=0)


def make_stream(side: str, parts: PartFolder, records: list[PartRecord], team: Team, *, deduplicate: bool) -> Stream:
    """The stream of one side of finished parts, the same on every rank."""
    first_documents = np.cumsum([0] + [record.documents[side] for record in records])
    dropped = _find_duplicates(side, parts, len(records), team) if deduplicate else np.empty(0, np.int64)
    tokens = [record.tokens[side] for record in records]
    for part in np.unique(np.searchsorted(first_documents, dropped, side="right") - 1):
        inside = dropped[(dropped >= first_documents[part]) & (dropped < first_documents[part + 1])] - first_documents[part]
        tokens[part] -= int(parts.read_documents(part, side)["length"][inside].sum())
    return Stream(side, parts, dropped, first_documents, np.cumsum([0, *tokens]))


def _find_duplicates(side: str, parts: PartFolder, count: int, team: Team) -> IntArray:
    """Numbers of the documents whose text occurred before, sorted. Ranks look through different digests."""
    buckets = range(team.rank, _BUCKETS, team.size)
    found = team.together(lambda: [_bucket_duplicates(side, parts, count, bucket) for bucket in buckets])
    everyones = team.gather(np.concatenate([np.empty(0, np.int64), *found]))
    return np.sort(np.concatenate(everyones))


def _bucket_duplicates(side: str, parts: PartFolder, count: int, bucket: int) -> IntArray:
    digests, numbers, first = [], [], 0
    for part in range(count):
        found = parts.read_documents(part, side)["digest"]
        inside = np.flatnonzero(found[:, 0] % np.uint64(_BUCKETS) == bucket)
        digests.append(found[inside])
        numbers.append(inside + first)
        first += len(found)
    digest, number = np.concatenate(digests), np.concatenate(numbers)
    order = np.lexsort((digest[:, 1], digest[:, 0]))  # stable: equal digests stay in the order of the stream
    repeats = (np.diff(digest[order], axis=0) == 0).all(axis=1)
    duplicates: IntArray = number[order[1:][repeats]]
    return duplicates


class ShardFolder:
    """The shards of one side in the making, and a record of each finished one, so that none is written twice."""

    def __init__(self, corpus: Path, records: Path, stream: Stream, options: Options, fingerprint: str):
        self._folder, self._records = corpus / stream.side, records
        self._stream, self._options, self._fingerprint = stream, options, fingerprint

    def write(self, team: Team, threads: int) -> list[Shard]:
        """Writes this rank's share of what is missing; returns all shards of the side when every rank has done so.

        Raises:
            UserError: from writing; or a shard is not there although its rank has finished.
        """
        size = self._options.shard_tokens
        numbers = range(-(-self._stream.tokens // size))
        with ThreadPoolExecutor(min(threads, _MOST_THREADS)) as pool:

            def finish() -> None:
                if numbers:
                    with named_errors(self._folder):
                        self._folder.mkdir(parents=True, exist_ok=True)
                for _ in pool.map(self._finish, [team] * len(numbers), numbers[team.rank :: team.size]):
                    pass

            team.together(finish)
        return team.together(lambda: [self._written(number) for number in numbers])

    def _written(self, number: int) -> Shard:
        shard = self._find(number)
        if shard is None:  # an index without it would be a corpus with a hole
            raise UserError(
                f"{self._record(number)}: not there or damaged although its rank has finished; ranks on several hosts need an output on a"
                " file system that shows all of them the same; start the same command again"
            )
        return shard

    def _finish(self, team: Team, number: int) -> None:
        team.check()
        if self._find(number) is not None:
            return
        size = self._options.shard_tokens
        piece = self._stream.read(number * size, min((number + 1) * size, self._stream.tokens))
        self._record(number).unlink(missing_ok=True)  # should we be killed below, an earlier build's would pass for this shard's
        shard = write_shard(self._folder / f"{number:06d}.tar", piece, self._options.block_tokens)
        write_json(self._record(number), {"fingerprint": self._fingerprint, "shard": shard_to_json(shard)})

    def _find(self, number: int) -> Shard | None:
        """The record of a finished shard, if it was made from the same stream in the same way."""
        try:
            values: dict[str, Any] = json.loads(self._record(number).read_bytes())
            path = self._folder / values["shard"]["file"]
            if values["fingerprint"] != self._fingerprint or path.stat().st_size != values["shard"]["bytes"]:
                return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return shard_from_json(values["shard"], str(self._record(number)), self._options.block_tokens, self._stream.parts.dtype)

    def _record(self, number: int) -> Path:
        return self._records / f"{self._stream.side}.{number:06d}.json"

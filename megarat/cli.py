"""The command line: verbs to functions, no logic. ``megarat --help`` imports nothing heavy.

Exit codes: 0 done; 2 bad input (one message, no traceback); 70 a rank died or hung; 75 stopped early on request with a good checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

from megarat import mesh
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, StoppedEarly, ToldByFirstRank, UserError

_PATTERN_HELP = "'dense', 'D=16,W=256,I=4', or a YAML list with one entry a layer (an entry may be a list a head)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output, as in `| head`, has read enough. What the interpreter flushes at its end has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        if not isinstance(error, ToldByFirstRank):
            print(f"megarat: {_rank()}error: {error}", file=sys.stderr)
        mesh.abandon()
        return EXIT_BAD_INPUT
    except StoppedEarly as stop:
        if not _rank():
            print(f"megarat: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_OK


def _rank() -> str:
    """Empty on the first rank, else a prefix that names this one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _parser() -> argparse.ArgumentParser:
    from megarat import __version__

    parser = argparse.ArgumentParser(prog="megarat", description="Train RAT+ language models dense, run them sparse.")
    parser.add_argument("--version", action="version", version=f"megarat {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_pretrain(verbs)
    _add_adapt(verbs)
    _add_eval(verbs)
    _add_generate(verbs)
    _add_serve(verbs)
    _add_checkpoint(verbs)
    _add_plan(verbs)
    _add_status(verbs)
    _add_doctor(verbs)
    _add_demo(verbs)
    return parser


def _add_pretrain(verbs: Any) -> None:
    parser = verbs.add_parser("pretrain", help="dense pretraining with active recurrence learning; resumes from its run folder")
    _add_config(parser)
    _add_verify_resume(parser)
    parser.set_defaults(run=_pretrain)


def _add_adapt(verbs: Any) -> None:
    parser = verbs.add_parser("adapt", help="load weights, switch the attention pattern, train shortly")
    _add_config(parser)
    parser.add_argument(
        "--from", dest="parent", required=True, metavar="CHECKPOINT", help="checkpoint or run folder to start from"
    )
    parser.add_argument("--pattern", help=f"overrides attention.pattern: {_PATTERN_HELP}")
    parser.add_argument(
        "--task",
        help="overrides data.task: fine-tune on a task, 'needle' (or 'sft') or 'needle:single_1,…', instead of the corpus",
    )
    parser.add_argument(
        "--sparse-pass", action="store_true", help="keep the sparse pass of pretraining (attention.train_dilation)"
    )
    _add_verify_resume(parser)
    parser.set_defaults(run=_adapt)


def _add_verify_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify-resume",
        action="store_true",
        help="before a resumed run goes on, train one recorded pair again and compare losses and gradient norms",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML of the run (docs/config.md lists every key)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable"
    )


def _add_eval(verbs: Any) -> None:
    parser = verbs.add_parser("eval", help="evaluate a checkpoint under one or more patterns")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        help=f"{_PATTERN_HELP}; with ' + topk blocks=16,size=64,score=max' behind it, every query also reads its best blocks; repeatable",
    )
    parser.add_argument(
        "--tasks",
        default="ppl",
        help="comma-separated: 'ppl' (held-out loss), 'needle' (RULER's eight) or 'needle:single_1,…', 'longbench' or 'longbench:qasper,…', 'harness:piqa,…'",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write results.json there; processes that evaluate the same there share the work, and go on with it",
    )
    parser.add_argument("--shards", help="data to score (default: the run's own data.shards)")
    parser.add_argument("--split", default="validation", help="train or validation")
    parser.add_argument("--sequence-length", type=_positive, help="tokens of a sequence (default: as trained)")
    parser.add_argument("--micro-batch", type=_positive, default=8, help="sequences at a time")
    parser.add_argument("--limit-tokens", type=_positive, help="ppl: score at most this many tokens")
    parser.add_argument("--samples", type=_positive, default=100, help="needle: prompts a task")
    parser.add_argument("--seed", type=int, default=0, help="needle: seed of the prompts")
    parser.add_argument("--needle-text", metavar="FILE", help="needle: a text to hide needles in (default: made-up sentences)")
    parser.add_argument("--eval-data", metavar="DIR", help="harness: what data_tools/prepare_eval.py wrote")
    parser.add_argument("--longbench-data", metavar="DIR", help="longbench: the folder of its jsonl files")
    parser.add_argument("--limit", type=_positive, help="harness, longbench: items a task (default: all)")
    parser.add_argument("--tokenizer", help="tokenizer file or folder (default: the one stored with the checkpoint)")
    _add_device(parser)
    _add_tensor(parser)
    parser.set_defaults(run=_eval)


def _add_generate(verbs: Any) -> None:
    parser = verbs.add_parser("generate", help="continue a prompt from the sparse cache")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--pattern", help=f"{_PATTERN_HELP}, or one with ' + topk …' as in eval (default: the checkpoint's own)")
    parser.add_argument("--max-new-tokens", type=_positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--stop-id", action="append", type=int, default=[], metavar="ID", help="end at this token; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="tokenizer file or folder (default: the one stored with the checkpoint)")
    _add_device(parser)
    _add_tensor(parser)
    parser.set_defaults(run=_generate)


def _add_serve(verbs: Any) -> None:
    parser = verbs.add_parser("serve", help="an OpenAI-compatible completions endpoint, from the sparse cache")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint or run folder")
    parser.add_argument(
        "--pattern",
        action="append",
        default=[],
        help=f"{_PATTERN_HELP}, or one with ' + topk …' as in eval; repeatable: a request names one, or gets the first (default: the checkpoint's own)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rows", type=_positive, default=16, help="sequences decoded at a time")
    parser.add_argument("--max-length", type=_positive, help="tokens of a prompt and its answer together (default: as trained)")
    parser.add_argument("--tokenizer", help="tokenizer file or folder (default: the one stored with the checkpoint)")
    _add_device(parser)
    _add_tensor(parser)
    parser.set_defaults(run=_serve)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on GPUs, fp32 on CPUs")


def _add_tensor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensor", type=_positive, default=1, help="processes (of torchrun, srun or mpirun) that share the model by heads"
    )


def _add_checkpoint(verbs: Any) -> None:
    parser = verbs.add_parser("checkpoint", help="look inside a checkpoint, prove its integrity, export and import")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="shapes, step, tokens, pattern, parent, the mesh that wrote it")
    show.add_argument("path", metavar="CHECKPOINT")
    show.set_defaults(run=_checkpoint_show)
    verify = actions.add_parser("verify", help="check size and hash of every file")
    verify.add_argument("path", metavar="CHECKPOINT")
    verify.set_defaults(run=_checkpoint_verify)
    exported = actions.add_parser("export", help="write safetensors and a Hugging Face folder, and compare its logits")
    exported.add_argument("path", metavar="CHECKPOINT", help="checkpoint or run folder")
    exported.add_argument("out", metavar="OUT", help="folder to write")
    exported.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as trained")
    exported.add_argument("--pattern", help=f"what it is read by: {_PATTERN_HELP} (default: the checkpoint's own)")
    exported.add_argument("--tokenizer", help="tokenizer file or folder (default: the one stored with the checkpoint)")
    exported.add_argument("--no-compare", action="store_true", help="do not compare logits at the end; needs no transformers")
    exported.set_defaults(run=_checkpoint_export)
    imported = actions.add_parser(
        "import", help="bring in a .pth of the published RAT+ code, running nothing pickled in it, or an exported folder"
    )
    imported.add_argument("source", metavar="SOURCE", help="FILE.pth, or a folder that export wrote")
    imported.add_argument("out", metavar="OUT", help="checkpoint folder to write")
    imported.add_argument("--tokenizer", help="tokenizer file or folder to store with it")
    imported.set_defaults(run=_checkpoint_import)


def _add_plan(verbs: Any) -> None:
    parser = verbs.add_parser(
        "plan", help="memory, speed, pipeline bubble, days and checkpoint size of a run before it is queued"
    )
    _add_config(parser)
    parser.add_argument("--gpus", type=_positive, required=True, help="ranks, one a GPU")
    parser.add_argument("--gpu", default="H200", help="H200, H100, A100, or cpu (default: H200)")
    parser.add_argument("--tokens", type=float, help="length of the training, such as 100e9 (default: what the config trains)")
    parser.add_argument(
        "--measured", metavar="RUN", help="a run on one such GPU, whose efficiency is taken instead of an estimate"
    )
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    parser.set_defaults(run=_plan)


def _add_status(verbs: Any) -> None:
    parser = verbs.add_parser("status", help="where runs stand: jobs, pair, loss, speed, time left, restarts, checkpoint, health")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or one of several runs")
    parser.set_defaults(run=_status)


def _add_doctor(verbs: Any) -> None:
    parser = verbs.add_parser("doctor", help="what is installed, which fast paths are on, what is missing and how to get it")
    parser.set_defaults(run=_doctor)


def _add_demo(verbs: Any) -> None:
    parser = verbs.add_parser("demo", help="the whole life of a RAT+ model on real text, on whatever this machine has")
    parser.add_argument("--out", default="demo-run", metavar="DIR", help="where everything is written (default: demo-run)")
    parser.add_argument(
        "--text", action="append", default=[], metavar="PATH", help="your own .txt/.jsonl/.parquet instead; repeatable"
    )
    parser.add_argument("--tokenizer", help="your own Hugging Face or SentencePiece tokenizer instead of Mistral v1")
    parser.add_argument("--pairs", type=_positive, help="pretraining pairs (default: what fits the time on this machine)")
    parser.add_argument(
        "--released",
        metavar="FOLDER",
        help="also show this model, a folder that checkpoint export wrote (default: examples/claim/release, if it is there)",
    )
    parser.set_defaults(run=_demo)


def _pretrain(arguments: argparse.Namespace) -> None:
    from megarat import config
    from megarat.train.loop import pretrain

    pretrain(config.load(arguments.config, arguments.overrides), arguments.verify_resume)


def _adapt(arguments: argparse.Namespace) -> None:
    from megarat import config
    from megarat.train.adapt import adapt

    overrides = list(arguments.overrides)
    if arguments.pattern:
        overrides.append(f"attention.pattern={_quoted(arguments.pattern)}")
    if arguments.task:
        overrides.append(f'data.task="{arguments.task}"')
    adapt(config.load(arguments.config, overrides), arguments.parent, arguments.sparse_pass, arguments.verify_resume)


def _eval(arguments: argparse.Namespace) -> None:
    from megarat.eval.report import write_report
    from megarat.eval.runner import EvalSettings, evaluate, table, write_results
    from megarat.mesh import identify
    from megarat.train.guard import StopRequest

    settings = EvalSettings(
        patterns=[_reading(text) for text in arguments.pattern],
        tasks=arguments.tasks.split(","),
        shards=arguments.shards,
        split=arguments.split,
        sequence_length=arguments.sequence_length,
        micro_batch=arguments.micro_batch,
        limit_tokens=arguments.limit_tokens,
        samples=arguments.samples,
        seed=arguments.seed,
        needle_text=arguments.needle_text,
        eval_data=arguments.eval_data,
        longbench_data=arguments.longbench_data,
        limit=arguments.limit,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        precision=arguments.precision,
        tensor=arguments.tensor,
    )
    # Asked to stop, an evaluation that keeps its work ends its piece of it first; without --out there is nothing to keep.
    with StopRequest().listening() if arguments.out else nullcontext() as stop:
        results = evaluate(arguments.checkpoint, settings, arguments.out, stop)
    if identify(os.environ).rank > 0:
        return
    print(table(results))
    if arguments.out:
        print(f"\nwritten: {write_results(results, arguments.out)}, {write_report(results, arguments.out)}")


def _generate(arguments: argparse.Namespace) -> None:
    from megarat.infer.sampling import Sampling
    from megarat.infer.text import print_continuation

    sampling = Sampling(arguments.temperature, arguments.top_p, arguments.repetition_penalty, arguments.seed)
    with _silence_unless_first() if arguments.tensor > 1 else nullcontext():
        print_continuation(
            arguments.checkpoint,
            arguments.prompt,
            pattern=_reading(arguments.pattern) if arguments.pattern else None,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            stop_ids=arguments.stop_id,
            stops=arguments.stop,
            tokenizer=arguments.tokenizer,
            device=arguments.device,
            precision=arguments.precision,
            tensor=arguments.tensor,
        )


@contextmanager
def _silence_unless_first() -> Iterator[None]:
    """All ranks that share a model write the same; one of them is heard."""
    from megarat.mesh import identify

    if identify(os.environ).rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _serve(arguments: argparse.Namespace) -> None:
    from megarat.infer.server import serve

    serve(
        arguments.checkpoint,
        patterns=[_reading(text) for text in arguments.pattern],
        host=arguments.host,
        port=arguments.port,
        rows=arguments.rows,
        max_length=arguments.max_length,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        precision=arguments.precision,
        tensor=arguments.tensor,
    )


def _checkpoint_show(arguments: argparse.Namespace) -> None:
    from megarat.checkpoint.load import show

    print(show(arguments.path))


def _checkpoint_verify(arguments: argparse.Namespace) -> None:
    from megarat.checkpoint.load import verify

    print(verify(arguments.path))


def _checkpoint_export(arguments: argparse.Namespace) -> None:
    from megarat.checkpoint.export import export_checkpoint

    told = export_checkpoint(
        arguments.path,
        arguments.out,
        dtype=arguments.dtype,
        pattern=_pattern(arguments.pattern) if arguments.pattern else None,
        tokenizer=arguments.tokenizer,
        compare=not arguments.no_compare,
    )
    print(told)


def _checkpoint_import(arguments: argparse.Namespace) -> None:
    from megarat.checkpoint.convert import import_checkpoint

    print(import_checkpoint(arguments.source, arguments.out, arguments.tokenizer))


def _plan(arguments: argparse.Namespace) -> None:
    import json

    from megarat import config, plan

    planned = plan.make_plan(
        config.load(arguments.config, arguments.overrides), arguments.gpus, arguments.gpu, arguments.measured
    )
    print(json.dumps(plan.as_json(planned)) if arguments.json else plan.report(planned, arguments.tokens))
    plan.refuse_if_too_large(planned)


def _status(arguments: argparse.Namespace) -> None:
    from megarat.status import report

    for number, paragraph in enumerate(report(arguments.runs)):
        print("\n" * (number > 0) + paragraph)


def _doctor(_: argparse.Namespace) -> None:
    from megarat.doctor import report

    print(report())


def _demo(arguments: argparse.Namespace) -> None:
    from megarat.demo.life import demo

    demo(arguments.out, arguments.text, arguments.tokenizer, arguments.pairs, arguments.released)


def _reading(text: str) -> Any:
    """A pattern with what follows it behind a ``+``."""
    from megarat.infer.reading import ReadingSpec

    pattern, _, extra = text.partition("+")
    return ReadingSpec(_pattern(pattern), extra)


def _pattern(text: str) -> Any:
    """A pattern from the command line: plain text, or a YAML list a layer."""
    if not text.lstrip().startswith("["):
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        fault = " ".join(str(error).split())
        raise UserError(f"--pattern {text!r} is not a YAML list: {fault}; write for example '[dense, \"D=16,W=32\"]'") from None


def _quoted(pattern: str) -> str:
    return pattern if pattern.lstrip().startswith("[") else f'"{pattern}"'


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value

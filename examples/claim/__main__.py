"""``python -m examples.claim``: the corpus, the arms and the report of the experiment.

python -m examples.claim run --out DIR           make DIR/corpus if it is not there, train and measure every arm; DIR/ARM-SEED.json
python -m examples.claim corpus DIR              the corpus alone, where there is a network
python -m examples.claim repeats DIR             how much of it can be copied from far back; results/repeats.json
python -m examples.claim report [RESULTS]        tables and figures of the README from RESULTS/EXPERIMENT/ARM-SEED.json
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.claim import arms
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, StoppedEarly, UserError
from megarat.train.guard import StopRequest

_HERE = Path(__file__).resolve().parent
_POLL_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.call(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except StoppedEarly as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.claim", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="make the corpus, then train and measure arms, each in a process of its own")
    run.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(arms.ARMS)}; all of them by default")
    run.add_argument("--jobs", type=_at_least(1), default=1, help="arms at a time on the one device")
    run.set_defaults(call=_run)
    one = commands.add_parser("arm", help="train and measure one arm in this process")
    one.add_argument("arm", metavar="ARM")
    one.set_defaults(call=_one)
    for command in (run, one):
        command.add_argument(
            "--out", required=True, type=Path, help="folder for the results, and for the runs unless run.dir is set"
        )
        command.add_argument("--corpus", type=Path, help="folder of the corpus; default: OUT/corpus")
        command.add_argument("--config", default=str(_HERE / "small.yaml"), help="YAML of the size (%(default)s)")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
        command.add_argument(
            "--adapt",
            choices=tuple(arms.ADAPTATIONS),
            default="full",
            help="which adaptations; brief: those to D=16 and D=64 (%(default)s)",
        )
        command.add_argument(
            "--needles", type=_at_least(0), default=0, metavar="BATCHES", help="also fine-tune on needle tasks, so many batches"
        )
        command.add_argument(
            "--tune",
            nargs="+",
            choices=arms.NEEDLE_READINGS,
            default=arms.NEEDLE_READINGS,
            metavar="READING",
            help=f"which fine-tunings --needles does, in this order; of {', '.join(arms.NEEDLE_READINGS)}; all of them by default",
        )
        command.add_argument("--keep", action="store_true", help="keep the runs of adaptations and fine-tunings")
    corpus = commands.add_parser("corpus", help="fetch the text and make the shards")
    corpus.add_argument("folder", help="for packages, documents and shards")
    corpus.add_argument("--wide", action="store_true", help="also make FOLDER/wide: more packages, the same documents held out")
    corpus.set_defaults(call=_corpus)
    repeats = commands.add_parser("repeats", help="count what could be copied from far back in a sequence, by kind of text")
    repeats.add_argument("folder", type=Path, help="a corpus")
    repeats.add_argument("--to", type=Path, default=_HERE / "results" / "repeats.json", help="file to write (%(default)s)")
    repeats.set_defaults(call=_repeats)
    report = commands.add_parser("report", help="write tables and figures from the results")
    report.add_argument(
        "results", nargs="?", default=str(_HERE / "results"), help="folder of EXPERIMENT/ARM-SEED.json (%(default)s)"
    )
    report.add_argument("--readme", default=str(_HERE / "README.md"), help="Markdown file whose tables are filled (%(default)s)")
    report.set_defaults(call=_report)
    return parser


def _at_least(smallest: int) -> Callable[[str], int]:
    """A type of argument."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < smallest:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {smallest}")
        return value

    return whole_number


def _run(options: argparse.Namespace) -> int:
    """Start arms as places become free; a failed one does not stop the others. Returns the first exit code that is not 0."""
    waiting = list(dict.fromkeys(options.arms or arms.ARMS))
    for arm in waiting:
        arms.pretraining(options.config, arm, _overrides(options))  # a bad config is refused before anything starts
    if not (_corpus_of(options) / "shards").is_dir():
        _build(_corpus_of(options))
    running: dict[str, subprocess.Popen[bytes]] = {}
    codes: list[int] = []
    told = False
    with StopRequest().listening() as stop:
        while running or (waiting and stop.reason is None):
            while waiting and len(running) < options.jobs and stop.reason is None:
                arm = waiting.pop(0)
                running[arm] = subprocess.Popen(_command(arm, options))
            time.sleep(_POLL_S)
            if stop.reason is not None and not told:
                told = True
                _pass_on(stop.reason, running)
            for arm, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[arm]
                    codes.append(code)
                    print(f"{arm}: exit code {code}", flush=True)
    if stop.reason is not None:
        raise StoppedEarly(f"stopped ({stop.reason}); the same command goes on from what {options.out} holds")
    return next((code for code in codes if code), EXIT_OK)


def _pass_on(reason: str, running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Ask the arms to end with what they are at, a training with a checkpoint. A terminal's Ctrl-C has reached them already."""
    if reason != signal.Signals.SIGINT.name:
        for process in running.values():
            process.send_signal(signal.SIGTERM)


def _command(arm: str, options: argparse.Namespace) -> list[str]:
    places = ["--out", str(options.out), "--corpus", str(_corpus_of(options)), "--config", options.config]
    settings = [part for override in options.set for part in ("--set", override)]
    extras = [
        "--adapt",
        options.adapt,
        "--needles",
        str(options.needles),
        "--tune",
        *options.tune,
        *(["--keep"] if options.keep else []),
    ]
    return [sys.executable, "-m", "examples.claim", "arm", arm, *places, *settings, *extras]


def _one(options: argparse.Namespace) -> int:
    from examples.claim import life

    kinds = _corpus_of(options) / "kinds"
    needles = arms.NeedleTuning(options.needles, readings=tuple(options.tune)) if options.needles else None
    extras = life.Extras(kinds if kinds.is_dir() else None, needles, options.adapt, options.keep)
    with StopRequest().listening() as stop:
        life.live(options.config, options.arm, options.out, _overrides(options), extras, stop)
    return EXIT_OK


def _corpus(options: argparse.Namespace) -> int:
    _build(Path(options.folder), options.wide)
    return EXIT_OK


def _build(folder: Path, wide: bool = False) -> None:
    from examples.claim import corpus

    for build in (corpus.build, corpus.build_wide) if wide else (corpus.build,):
        built = build(folder)
        print(f"{built.shards}: {built.train_tokens:,} tokens to train on, {built.validation_tokens:,} held out", file=sys.stderr)


def _repeats(options: argparse.Namespace) -> int:
    from examples.claim import repeats

    repeats.write(options.folder, options.to)
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from examples.claim import report

    for path in report.write(options.results, options.readme):
        print(path)
    return EXIT_OK


def _corpus_of(options: argparse.Namespace) -> Path:
    return Path(options.corpus or options.out / "corpus")


def _overrides(options: argparse.Namespace) -> tuple[str, ...]:
    """What the command line says, behind the places that follow from its folders."""
    return (f"data.shards={_corpus_of(options) / 'shards'}", f"run.dir={options.out / 'runs'}", *options.set)


if __name__ == "__main__":
    sys.exit(main())

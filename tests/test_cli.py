"""The command line: exit code 2 and one clear line for bad input, and what each verb prints when all is well."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

import megarat
from megarat import cli
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED, StoppedEarly


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``megarat ARGUMENTS`` in this process."""
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys, *arguments) -> str:
    """The one line of a refusal."""
    code, out, err = run(capsys, *arguments)
    assert code == EXIT_BAD_INPUT
    assert out == ""
    assert err.startswith("megarat: error: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def checkpoint(golden_pth, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "tiny"
    assert cli.main(["checkpoint", "import", str(golden_pth), str(folder), "--tokenizer", str(tokenizer)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A Hugging Face tokenizer of ten words, with id 2 as EOS."""
    words = ["<unk>", "<s>", "</s>", "one", "two", "three", "four", "five", "six", "seven"]
    folder = tiny_run.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), words)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def config(tmp_path) -> Path:
    """A sound config of a tiny run on a corpus that exists."""
    tiny_run.write_shards(tmp_path / "shards")
    settings = tiny_run.config(run={"dir": str(tmp_path / "run")}, data={"shards": str(tmp_path / "shards")})
    path = tmp_path / "run.yaml"
    path.write_text(settings.to_yaml())
    return path


# ---- what works -------------------------------------------------------------------------------------------------------------


def test_help_names_every_verb():
    done = subprocess.run([sys.executable, "-m", "megarat", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("pretrain", "adapt", "eval", "generate", "serve", "checkpoint", "doctor", "demo"):
        assert re.search(rf"^ {{4}}{verb}\s", done.stdout, re.MULTILINE)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"megarat {megarat.__version__}\n"


def test_import_show_and_verify_a_published_checkpoint(capsys, golden_pth, tmp_path):
    out = tmp_path / "imported"
    code, said, _ = run(capsys, "checkpoint", "import", golden_pth, out)
    assert code == 0 and "RAT+, 2 layers x 256, 2 heads, vocabulary 512" in said
    code, said, _ = run(capsys, "checkpoint", "show", out)
    assert code == 0 and "256" in said and "512" in said
    code, said, _ = run(capsys, "checkpoint", "verify", out)
    assert code == 0 and str(out) in said


def test_generate_continues_a_prompt_with_the_tokens_of_the_model(capsys, checkpoint):
    code, out, err = run(
        capsys, "generate", checkpoint, "--prompt", "one two", "--max-new-tokens", 5, "--pattern", "D=4,W=2", "--device", "cpu"
    )
    assert code == 0 and out.startswith("one two")
    assert "2 layers x 256, 2 heads of 128, pattern D=4,W=2,I=0" in err and "cache for" in err


def test_eval_prints_a_table_and_writes_results(capsys, checkpoint, tokenizer, tmp_path):
    shards = tiny_run.write_shards(tmp_path / "shards", tokenizer=load_tokenizer(tokenizer).info)
    arguments = ["--shards", shards, "--split", "train", "--sequence-length", 64, "--device", "cpu", "--out", tmp_path / "out"]
    code, out, _ = run(capsys, "eval", checkpoint, *arguments, "--pattern", "dense", "--pattern", "[dense, [D=4, 'D=8,W=1']]")
    assert code == 0
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    for row in written["tasks"]["ppl"]:
        cell = row["pattern"].replace("|", r"\|")
        assert f"| {cell} | {row['loss']:.4f} |" in out
    assert written["tasks"]["ppl"][1]["pattern"] == "dense | [D=4,W=0,I=0; D=8,W=1,I=0]"


def test_a_stop_on_request_is_exit_code_75(capsys, config, monkeypatch):
    def pretrain(*_):
        raise StoppedEarly("stopped at pair 3")

    monkeypatch.setattr("megarat.train.loop.pretrain", pretrain)
    assert run(capsys, "pretrain", config) == (EXIT_STOPPED, "", "megarat: stopped at pair 3\n")


def test_a_bug_keeps_its_traceback(config, monkeypatch):
    def pretrain(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("megarat.train.loop.pretrain", pretrain)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["pretrain", str(config)])


def test_a_reader_that_has_read_enough_is_no_error(checkpoint):
    shown = f"{sys.executable} -m megarat checkpoint show {checkpoint} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (EXIT_OK, "")


# ---- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hiden=8", "unknown key model.hiden; did you mean model.hidden?"),
        ("train.pairs", "--set 'train.pairs': write section.key=value"),
        ("train.pairs=[1", "the value is not valid YAML"),
        ("model.hidden=15", "not a multiple of model.heads"),
        ("attention.pattern=D=0", "the dilation D must be 1"),
        ("attention.train_window=-1", "must not be negative"),
        ("attention.pattern=[dense]", "1 entries for 2 layers"),
        ("parallel.zero=0", "parallel.zero is 0; use 1, 2 or 3"),
        ("optim.lr=nan", "optim.lr is 'nan'; it must be a finite number"),
        ("data.shards=absent", "absent/train"),
        ("model.vocab=60", "60"),  # the corpus has 64
        ("data.sequence_length=5000", "5000"),  # the corpus has 3000 tokens
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_trained(capsys, config, tmp_path, override, expected):
    assert expected in refusal(capsys, "pretrain", config, "--set", override)
    assert not list((tmp_path / "run").rglob("pair_*"))


def test_a_config_that_cannot_be_read_is_refused(capsys, tmp_path):
    assert "absent.yaml" in refusal(capsys, "pretrain", tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("run: {dir: x\ntrain: [")
    assert "bad.yaml is not valid YAML" in refusal(capsys, "pretrain", tmp_path / "bad.yaml")


def test_adapting_to_a_pattern_that_is_none_or_from_nothing_is_refused(capsys, config, checkpoint, tmp_path):
    assert "cannot read 'D='" in refusal(capsys, "adapt", config, "--from", checkpoint, "--pattern", "D=")
    assert "absent" in refusal(capsys, "adapt", config, "--from", tmp_path / "absent", "--pattern", "D=4")
    assert "3 entries for 2 layers" in refusal(capsys, "adapt", config, "--from", checkpoint, "--pattern", "[dense, D=4, D=4]")
    assert "256" in refusal(capsys, "adapt", config, "--from", checkpoint, "--pattern", "D=4")  # the parent's width


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pattern", "D=16,W"], "cannot read 'W'"),
        (["--pattern", "[dense"], "--pattern '[dense' is not a YAML list"),
        (["--pattern", "[1, 64]"], "pattern: found 1"),
        (["--pattern", "[dense]"], "1 entries for 2 layers"),
        (["--tasks", "ppl,mmlu"], "unknown task 'mmlu'"),
        (["--split", "test"], "--split: 'test'"),
        (["--shards", "absent"], "absent/validation"),
        ([], "name the data"),
    ],
)
def test_eval_refuses(capsys, checkpoint, arguments, expected):
    assert expected in refusal(capsys, "eval", checkpoint, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", ""], "--prompt: the text is empty"),
        (["--prompt", "one", "--temperature", "-1"], "need temperature >= 0"),
        (["--prompt", "one", "--top-p", "0"], "0 < top_p <= 1"),
        (["--prompt", "one", "--pattern", "W=3"], "the dilation D is missing"),
        (["--prompt", "one", "--tokenizer", "absent"], "absent: no such tokenizer"),
    ],
)
def test_generate_refuses(capsys, checkpoint, arguments, expected):
    assert expected in refusal(capsys, "generate", checkpoint, "--device", "cpu", *arguments)


def test_generate_without_a_tokenizer_says_how_to_name_one(capsys, golden_pth, tmp_path):
    run(capsys, "checkpoint", "import", golden_pth, tmp_path / "bare")
    assert "name one with --tokenizer" in refusal(capsys, "generate", tmp_path / "bare", "--prompt", "x", "--device", "cpu")


def test_a_gpu_that_is_not_there_is_refused(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in refusal(capsys, "generate", checkpoint, "--prompt", "one", "--device", "cuda")


@pytest.mark.parametrize("verb", [["eval"], ["generate", "--prompt", "x"], ["checkpoint", "show"], ["checkpoint", "verify"]])
def test_a_path_without_a_checkpoint_is_refused_by_name(capsys, tmp_path, verb):
    for path in (tmp_path / "absent", tmp_path):
        assert str(path) in refusal(capsys, *verb, path)


@pytest.mark.parametrize("action", ["verify", "show"])
def test_a_flipped_bit_in_a_checkpoint_is_refused_by_file(capsys, golden_pth, tmp_path, action):
    out = tmp_path / "imported"
    run(capsys, "checkpoint", "import", golden_pth, out)
    damaged = out / "state.json" if action == "show" else max((out / "weights").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    code, said, err = run(capsys, "checkpoint", action, out)  # a line for each damaged file
    assert (code, said) == (EXIT_BAD_INPUT, "") and err.startswith("megarat: error: ") and damaged.name in err


def test_import_refuses_what_is_no_published_checkpoint_and_an_existing_folder(capsys, golden_pth, tmp_path):
    text = tmp_path / "text.pth"
    text.write_text("hello")
    assert "text.pth" in refusal(capsys, "checkpoint", "import", text, tmp_path / "out")
    assert "absent.pth" in refusal(capsys, "checkpoint", "import", tmp_path / "absent.pth", tmp_path / "out")
    assert "absent" in refusal(capsys, "checkpoint", "import", golden_pth, tmp_path / "out", "--tokenizer", tmp_path / "absent")
    assert not (tmp_path / "out").exists()
    assert "exists" in refusal(capsys, "checkpoint", "import", golden_pth, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["eval"],
        ["eval", "x", "--limit-tokens", "0"],
        ["eval", "x", "--limit-tokens", "many"],
        ["generate", "x"],
        ["generate", "x", "--prompt", "y", "--device", "tpu"],
        ["checkpoint", "burn", "x"],
        ["pretrain", "x", "--pairs", "3"],
    ],
    ids=" ".join,
)
def test_a_malformed_command_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == EXIT_BAD_INPUT
    assert "usage: megarat" in capsys.readouterr().err


def test_the_module_passes_the_exit_code_on(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"train": {"pears": 3}}))
    done = subprocess.run([sys.executable, "-m", "megarat", "pretrain", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (EXIT_BAD_INPUT, "")
    assert done.stderr == f"megarat: error: {path}: unknown key train.pears; did you mean train.pairs?\n"

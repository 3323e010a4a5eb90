"""A checkpoint of one mesh, read by ranks that share the model: the same logits, tokens and losses as on one process."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from torch import distributed

import megarat
from megarat import cli, mesh
from megarat.errors import UserError
from megarat.eval import speed
from megarat.eval.perplexity import batch_loss
from megarat.infer import cache, text
from megarat.infer.cache import SparseCache
from megarat.infer.load import LoadedModel, load
from megarat.infer.sampling import Sampling
from megarat.infer.server import _ranks_of_one_model
from megarat.model.layers import FeedForward
from megarat.parallel import worlds
from megarat.parallel.tensor import ALONE, TensorParallel
from megarat.train.loop import pretrain

READINGS = ("dense", "D=4,W=3,I=2", [["dense", "D=4"], ["D=2,W=3", "D=-1,W=5,I=2"]], "D=4 + topk blocks=2,size=4,score=max")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Written by two pipeline stages."""
    folder = tmp_path_factory.mktemp("pipelined")
    shards = tiny_run.write_shards(folder / "corpus")
    data, training, stages = {"shards": str(shards)}, {"pairs": 2}, {"pipeline": 2}
    worlds.run(2, pretrain, tiny_run.config(run={"dir": str(folder / "run")}, data=data, train=training, parallel=stages))
    return folder / "run"


def prompts() -> torch.Tensor:
    return torch.randint(0, tiny_run.VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def answers(model: LoadedModel) -> list[dict[str, torch.Tensor]]:
    """Of each reading: logits, greedy and drawn tokens, and the summed loss."""
    found = []
    for spec in READINGS:
        reading, ids = model.reading(spec), prompts()
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        found.append(
            {
                "logits": model(ids, reading),
                "greedy": model.generate(ids, 12, reading, attention_mask=mask),
                "drawn": model.generate(ids, 12, reading, sampling=Sampling(temperature=1.0, seed=3)),
                "loss": torch.tensor(batch_loss(model.lm, ids[:, :-1], ids[:, 1:], reading)),
            }
        )
    return found


def on_ranks(checkpoint: Path, tensor: int) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """Elements that this rank holds, and its answers."""
    ranks = TensorParallel(mesh.start("cpu", tensor=tensor).group(mesh.TENSOR))
    model = load(checkpoint, device="cpu", ranks=ranks)
    return sum(parameter.numel() for parameter in model.parameters()), answers(model)


@pytest.mark.slow
def test_ranks_that_share_a_model_answer_like_one_process(checkpoint):
    """Two models of two ranks each: every rank says what one process says, and the two models the same bit for bit."""
    model = megarat.load(checkpoint, device="cpu")
    whole, expected = sum(parameter.numel() for parameter in model.parameters()), answers(model)
    ended = worlds.run(4, on_ranks, checkpoint, 2)
    for held, found in ended:
        assert held < 0.51 * whole  # all matrices are cut; norms are not
        for ours, theirs, first in zip(found, expected, ended[0][1], strict=True):
            # Sums of fp32 products in another order; the tokens' logits differ by far more than that.
            torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=0)
            assert torch.equal(ours["greedy"], theirs["greedy"])
            assert torch.equal(ours["drawn"], theirs["drawn"])
            assert all(torch.equal(ours[key], first[key]) for key in ours)


def test_shares_that_are_not_even_are_refused(checkpoint):
    class Three(TensorParallel):
        size = 3

    with pytest.raises(UserError, match=r"--tensor 3: the checkpoint's model\.heads is 2"):
        load(checkpoint, device="cpu", ranks=Three())
    with pytest.raises(UserError, match="--tensor 2: 1 process was started"):
        mesh.start("cpu", tensor=2)
    assert ALONE.size == 1


def command(arguments: list[str]) -> tuple[int, str]:
    """One rank of ``megarat``: the exit code and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(arguments)
    return code, out.getvalue()


def test_eval_by_ranks_that_share_a_model_says_what_one_process_says(checkpoint, tmp_path):
    shards = checkpoint.parent / "corpus"
    common = ["eval", str(checkpoint), "--device", "cpu", "--shards", str(shards), "--split", "train", "--limit-tokens", "320"]
    common += ["--pattern", "dense", "--pattern", "D=4"]
    assert command([*common, "--out", str(tmp_path / "one")])[0] == 0
    ended = worlds.run(4, command, [*common, "--out", str(tmp_path / "shared"), "--tensor", "2"])
    assert [code for code, _ in ended] == [0] * 4
    assert ended[0][1]
    assert not any(printed for _, printed in ended[1:])
    one, shared = (json.loads((tmp_path / name / "results.json").read_text())["tasks"]["ppl"] for name in ("one", "shared"))
    for ours, theirs in zip(shared, one, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


class Letters:
    """A tokenizer without a file."""

    eos_id, vocab_size, file = 2, tiny_run.VOCAB, Path("letters")

    def encode(self, texts):
        return [[3 + ord(letter) % (self.vocab_size - 3) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(64 + id_) for id_ in ids)


def continued(arguments: list[str]) -> tuple[int, str]:
    text.find_tokenizer = lambda model, named: Letters()
    return command(arguments)


def test_generate_by_ranks_that_share_a_model_prints_once_what_one_process_prints(checkpoint):
    common = ["generate", str(checkpoint), "--device", "cpu", "--prompt", "abc", "--pattern", "D=4,W=2", "--max-new-tokens", "16"]
    alone = worlds.run(1, continued, common)[0]
    assert alone[0] == 0
    assert len(alone[1]) > len("abc")
    assert worlds.run(2, continued, [*common, "--tensor", "2"]) == [alone, (0, "")]


def test_what_ends_the_first_rank_ends_the_others(checkpoint):
    """Both ranks of a shared model hear that there is no such corpus, or that the first was stopped."""
    (first, _), (second, _) = worlds.run(
        2, command, ["eval", str(checkpoint), "--device", "cpu", "--shards", "nowhere", "--tensor", "2"]
    )
    assert (first, second) == (2, 2)


def failing_amid_a_piece(arguments: list[str], failing: tuple[int, ...]) -> int | str:
    """One rank of ``megarat``, on some of which the model fails between two collectives; the exit code, or what it raised."""

    def fail(*_):
        raise UserError("no room for this")

    if int(os.environ["RANK"]) in failing:
        FeedForward.after_norm = fail
    try:
        return command(arguments)[0]
    except RuntimeError as error:
        return type(error).__name__


@pytest.mark.parametrize(("failing", "ends"), [((0,), [2, "RuntimeError"]), ((1,), ["RuntimeError", 2]), ((0, 1), [2, 2])])
def test_what_fails_amid_a_piece_of_work_ends_every_rank(checkpoint, failing, ends):
    """The others are in a collective of the model, where they hear no word, or have left with the same message."""
    arguments = ["eval", str(checkpoint), "--device", "cpu", "--shards", str(checkpoint.parent / "corpus"), "--split", "train"]
    assert worlds.run(2, failing_amid_a_piece, [*arguments, "--tensor", "2"], failing, timeout_s=60) == ends


SERVE = ["--device", "cpu", "--port", "0", "--rows", "3", "--max-length", "64", "--pattern", "D=4,W=2", "--pattern", "dense"]


def served(arguments: list[str]) -> tuple[int, list[dict]]:
    """One rank of ``megarat serve``; the first has clients. The exit code and what the clients got."""
    text.find_tokenizer = lambda model, named: Letters()
    answers: list[dict] = []
    clients = threading.Thread(target=ask_and_stop, args=(err := io.StringIO(), answers))
    if int(os.environ["RANK"]) == 0:
        clients.start()
    with contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    if clients.ident is not None:
        clients.join()
    return code, answers


def ask_and_stop(err: io.StringIO, answers: list[dict]) -> None:
    """Three at a time more requests than rows, to two patterns, one that draws; one client that goes away; then SIGTERM."""
    deadline = time.monotonic() + 300
    try:
        while (found := re.search(r"listening on http://[^:]*:([0-9]+)", err.getvalue())) is None:
            assert time.monotonic() < deadline, err.getvalue()
            time.sleep(0.05)
        bodies = [
            {"prompt": ["abc", "de"], "max_tokens": 30, "temperature": 0},
            {"prompt": "fgh", "max_tokens": 40, "temperature": 1.0, "seed": 5, "n": 2, "pattern": "dense"},
            {"prompt": "abc", "max_tokens": 20, "temperature": 0, "stop": ["A", "B", "C"]},
        ]
        gone = socket.create_connection(("127.0.0.1", int(found[1])))
        data = json.dumps({"prompt": "x", "max_tokens": 60, "stream": True}).encode()
        gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        gone.recv(16)
        gone.close()
        answers.extend({} for _ in bodies)
        askers = [threading.Thread(target=ask, args=(int(found[1]), body, answers[n])) for n, body in enumerate(bodies)]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def ask(port: int, body: dict, answer: dict) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer.update(json.loads(connection.getresponse().read()))
    del answer["id"], answer["created"]


def test_a_server_of_ranks_that_share_a_model_answers_like_one_process(checkpoint):
    alone = worlds.run(1, served, ["serve", str(checkpoint), *SERVE])
    shared = worlds.run(2, served, ["serve", str(checkpoint), *SERVE, "--tensor", "2"])
    assert shared == [alone[0], (0, [])]
    code, answers = alone[0]
    assert code == 0
    assert [len(answer["choices"]) for answer in answers] == [2, 2, 1]
    assert answers[0]["usage"]["completion_tokens"] == 60


def held_and_said(checkpoint: Path) -> list[tuple[int, int]]:
    """Of each reading, the bytes of cache this rank holds for a sequence, and those it asks for."""
    ranks = TensorParallel(mesh.start("cpu", tensor=2).group(mesh.TENSOR))
    model = load(checkpoint, device="cpu", ranks=ranks)
    asked: list[int] = []
    cache.check_fits = lambda batch, size, length, device: asked.append(size)
    held = [SparseCache(model.config, model.reading(spec), 1, 64, torch.float32, "cpu", model.lm.own_heads) for spec in READINGS]
    return [(own.bytes, size) for own, size in zip(held, asked, strict=True)]


def test_a_rank_asks_for_the_memory_of_its_own_heads(checkpoint):
    """Heads of one layer may have patterns of very different size."""
    ranks = worlds.run(2, held_and_said, checkpoint)
    assert all(held == said for found in ranks for held, said in found)
    model = megarat.load(checkpoint, device="cpu")
    whole = [SparseCache(model.config, model.reading(spec), 1, 64, torch.float32, "cpu").bytes for spec in READINGS]
    assert [first[0] + second[0] for first, second in zip(*ranks, strict=True)] == whole


def sequences_timed(checkpoint: Path) -> int:
    """Decoded together where this rank has room for three, or for four."""
    ranks = TensorParallel(mesh.start("cpu", tensor=2).group(mesh.TENSOR))
    model = load(checkpoint, device="cpu", ranks=ranks)
    speed.largest_batch = lambda size, device: 4 - ranks.rank
    return speed.measure(model.lm, model.reading("dense"), 64, 8)["sequences"]


def test_ranks_with_unequal_memory_time_the_same_number_of_sequences(checkpoint):
    assert worlds.run(2, sequences_timed, checkpoint, timeout_s=120) == [3, 3]


class Endless(Letters):
    """No token ends a text."""

    eos_id = tiny_run.VOCAB


def stopped_while_it_answers(arguments: list[str]) -> int:
    """One rank of ``megarat serve`` that hears SIGTERM in the middle of a long answer; the exit code."""
    text.find_tokenizer = lambda model, named: Endless()
    err = io.StringIO()
    if int(os.environ["RANK"]) == 0:
        threading.Thread(target=listen_and_stop, args=(err,), daemon=True).start()
    with contextlib.redirect_stderr(err):
        return cli.main(arguments)


def listen_and_stop(err: io.StringIO) -> None:
    """SIGTERM behind the first piece of a stream whose client stays to its end."""
    while (found := re.search(r"listening on http://[^:]*:([0-9]+)", err.getvalue())) is None:
        time.sleep(0.05)
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=300)
    body = {"prompt": "abc", "max_tokens": 20000, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    stream = connection.getresponse()
    stream.readline()
    os.kill(os.getpid(), signal.SIGTERM)
    stream.read()


def test_a_server_of_ranks_that_share_a_model_ends_in_the_middle_of_an_answer(checkpoint):
    """What the others were told to step, the first steps as well, or they would wait for it in a collective."""
    arguments = ["serve", str(checkpoint), "--device", "cpu", "--port", "0", "--rows", "1", "--max-length", "20100"]
    arguments += ["--pattern", "D=4,W=2", "--tensor", "2"]
    assert worlds.run(2, stopped_while_it_answers, arguments, timeout_s=120) == [0, 0]


def test_a_server_is_one_model(monkeypatch):
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="--tensor 2: 4 processes were started, but a server is one model; start 2 for it"):
        _ranks_of_one_model(2)

"""The completions endpoint on the loopback: answers, streams, clients that go away, and what is malformed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer.engine import Engine
from megarat.infer.generate import generate
from megarat.infer.reading import read_as
from megarat.infer.sampling import Sampling
from megarat.infer.server import Server
from megarat.model.lm import RATPlusLM

SHAPE = ModelConfig(layers=2, hidden=16, heads=2, vocab=140, init_std=0.5)
READING = read_as("D=4,W=3,I=1", SHAPE)
OTHER = read_as("D=-1,W=2", SHAPE)
CAPACITY = 400


class Bytes:
    """A tokenizer whose ids are the bytes of ASCII. 0 is EOS, which this model hardly ever says."""

    eos_id, vocab_size, file = 0, 128, Path("bytes")

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def model() -> RATPlusLM:
    return RATPlusLM(SHAPE).double().initialise(5)


@pytest.fixture
def server(model):
    engines = [Engine(model, reading, Bytes(), rows=3, capacity=CAPACITY) for reading in (READING, OTHER)]
    made = Server(engines, Bytes(), "tiny", "127.0.0.1", 0)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def expected(model, prompt: str, tokens: int, sampling: Sampling | None = None, reading=READING) -> str:
    ids = torch.tensor([list(prompt.encode())])
    made = generate(model, ids, tokens, reading, sampling=sampling or Sampling(), vocabulary=128, stop_id=0)[0].tolist()
    return bytes(made[: made.index(0)] if 0 in made else made).decode(errors="replace")


def ask(server, body, path: str = "/v1/completions", method: str = "POST") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, body if isinstance(body, (bytes, type(None))) else json.dumps(body))
    response = connection.getresponse()
    tree = json.loads(response.read())
    connection.close()
    return response.status, tree


def stream(server, body) -> list[dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}))
    response = connection.getresponse()
    assert response.status == 200 and response.getheader("Content-Type") == "text/event-stream"
    events = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line]
    assert events[-1] == b"[DONE]"
    return [json.loads(event) for event in events[:-1]]


def wait_until_idle(server) -> None:
    deadline = time.monotonic() + 120
    while server.engine.busy or server.engine._listeners:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_completion_is_the_text_of_generate(server, model):
    status, tree = ask(server, {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 0})
    [choice] = tree["choices"]
    assert status == 200 and tree["object"] == "text_completion" and tree["model"] == "tiny"
    assert choice == {"index": 0, "text": expected(model, "hello", 12), "logprobs": None, "finish_reason": "length"}
    assert tree["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


@pytest.mark.parametrize("prompt", [["one", "two!"], [list(b"one"), list(b"two!")]])
def test_several_prompts_have_each_their_choices(server, model, prompt):
    _, tree = ask(server, {"prompt": prompt, "max_tokens": 5, "temperature": 0, "n": 2})
    texts = [choice["text"] for choice in tree["choices"]]
    assert texts == [expected(model, text, 5) for text in ("one", "one", "two!", "two!")]
    assert [choice["index"] for choice in tree["choices"]] == [0, 1, 2, 3]


def test_a_request_may_name_any_pattern_that_is_served(server, model):
    """Also at the same time: each engine goes on while the other has work."""
    body = {"prompt": "pattern", "max_tokens": 30, "temperature": 0}
    texts = {}
    threads = [
        threading.Thread(
            target=lambda spec=spec: texts.update({spec: ask(server, {**body, "pattern": spec})[1]["choices"][0]["text"]})
        )
        for spec in ("D=-1,W=2", "W=3,D=4,I=1", "D=-1, W=2,I=0")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts["D=-1,W=2"] == texts["D=-1, W=2,I=0"] == expected(model, "pattern", 30, reading=OTHER)
    assert texts["W=3,D=4,I=1"] == expected(model, "pattern", 30) != texts["D=-1,W=2"]
    for spec, message in [
        ("D=8", "served here; this server has D=4,W=3,I=1, D=-1,W=2,I=0"),
        ("D", "cannot read"),
        (7, "expected a text"),
    ]:
        status, tree = ask(server, {**body, "pattern": spec})
        assert status == 400 and tree["error"]["message"].startswith("pattern") and message in tree["error"]["message"]
    assert ask(server, None, "/v1/models", "GET")[1]["data"][0]["patterns"] == ["D=4,W=3,I=1", "D=-1,W=2,I=0"]


def test_a_seed_draws_the_same_again_and_each_choice_differs(server, model):
    body = {"prompt": list(b"seed"), "max_tokens": 10, "temperature": 1.5, "top_p": 0.9, "seed": 11, "n": 2}
    texts = [[choice["text"] for choice in ask(server, body)[1]["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] == [expected(model, "seed", 10, Sampling(1.5, 0.9, seed=11 + n)) for n in range(2)]
    assert texts[0][0] != texts[0][1]


def test_a_stop_string_ends_the_text(server, model):
    free = expected(model, "stop", 20)
    _, tree = ask(server, {"prompt": "stop", "max_tokens": 20, "temperature": 0, "stop": [free[7:9], "never"]})
    assert tree["choices"][0]["text"] == free[: free.index(free[7:9])] and tree["choices"][0]["finish_reason"] == "stop"


def test_a_stream_adds_up_to_the_completion(server, model):
    events = stream(server, {"prompt": ["a", "bc"], "max_tokens": 9, "temperature": 0, "stream_options": {"include_usage": True}})
    texts, ends = ["", ""], [None, None]
    for event in events[:-1]:
        [choice] = event["choices"]
        assert ends[choice["index"]] is None
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] = choice["finish_reason"]
    assert texts == [expected(model, "a", 9), expected(model, "bc", 9)] and ends == ["length", "length"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 18
    assert len(events) > 4 and len({event["id"] for event in events}) == 1


def test_models_and_health(server):
    assert ask(server, None, "/health", "GET") == (200, {"status": "ok"})
    status, tree = ask(server, None, "/v1/models", "GET")
    assert status == 200 and [model["id"] for model in tree["data"]] == ["tiny"]


MALFORMED = [
    (b"{", "the body is not JSON"),
    (b"\xff\xfe", "the body is not JSON"),
    (b"[" * 100000, "the body is not JSON"),
    (b"[1]", "expected a JSON object, found list"),
    ({}, "prompt: expected a text"),
    ({"prompt": []}, "prompt: expected a text"),
    ({"prompt": [1, "a"]}, "prompt: expected a text"),
    ({"prompt": ""}, "prompt: it is empty"),
    ({"prompt": [999]}, "token ids outside the model's vocabulary of 140"),
    ({"prompt": "x" * 500}, "prompt: 500 tokens and 16 new ones are more than the 400 allowed together"),
    ({"prompt": "x", "max_tokens": 0}, "max_new_tokens is 0"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens: found 1.5; expected a whole number"),
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens: found 'many'"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature: found nan; expected a number"),
    (b'{"prompt": "x", "max_tokens": Infinity}', "max_tokens: found inf"),
    ({"prompt": "x", "temperature": -1}, "need temperature >= 0"),
    ({"prompt": "x", "top_p": 0}, "0 < top_p <= 1"),
    ({"prompt": "x", "n": 0}, "n: 1 prompts x 0"),
    ({"prompt": "x", "n": 1000}, "expected 1 to 128 completions"),
    ({"prompt": "x", "n": True}, "n: found True"),
    ({"prompt": "x", "stop": [1]}, "stop: expected a text"),
    ({"prompt": "x", "stream_options": 1}, "stream_options: expected an object"),
    ({"prompt": "x", "logprobs": 3}, "logprobs: is not supported"),
    ({"prompt": "x", "echo": True}, "echo: is not supported"),
    ({"prompt": "x", "best_of": 4}, "best_of: is not supported"),
    ({"prompt": ["fine", "x" * 500]}, "500 tokens"),
    ({"prompt": "x" * 200_000}, "200000 characters are more than the 400 tokens allowed together can hold"),
    (b'{"prompt": "a\\ud800b"}', "prompt: holds half of a character"),
    (b'{"prompt": "x", "max_tokens": 1%s}' % (b"0" * 400), "max_tokens: found 1000"),
    (b'{"prompt": "x", "temperature": 1%s}' % (b"0" * 400), "temperature: found 1000"),
    ({"prompt": "x", "repetition_penalty": 1e300}, "a repetition_penalty from 0.01 to 100"),
    ({"prompt": "x", "stop": ["y"] * 65}, "stop: found 65 texts; expected at most 64"),
    ({"prompt": ["x"] * 1000}, "n: 1000 prompts x 1"),
]


def test_what_is_malformed_is_refused_by_name_and_the_server_goes_on(server, model):
    for body, message in MALFORMED:
        status, tree = ask(server, body)
        assert status == 400 and message in tree["error"]["message"], (body, tree)
        assert tree["error"]["type"] == "invalid_request_error"
    assert not server.engine.busy and not server.engine._listeners
    assert ask(server, {"prompt": "hello", "max_tokens": 3, "temperature": 0})[1]["choices"][0]["text"] == expected(
        model, "hello", 3
    )


@pytest.mark.parametrize("length", ["-1", "ten", "", str(1 << 40), "9" * 5000])
def test_a_body_of_no_known_length_is_refused(server, length):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b"400" in connection.makefile("rb").readline()


def test_other_pages_and_methods_are_refused(server):
    assert ask(server, {"prompt": "x"}, "/v1/chat/completions")[0] == 404
    assert ask(server, None, "/", "GET")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request("DELETE", "/v1/models")
    assert connection.getresponse().status == 501


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, streaming):
    body = json.dumps({"prompt": "x", "max_tokens": 390, "n": 3, "temperature": 0, "stream": streaming}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if streaming:
            connection.recv(64)
        else:
            time.sleep(0.05)
    wait_until_idle(server)
    assert not server.engine._listeners


def test_a_client_that_goes_away_is_noticed_however_fast_the_steps_are(server, monkeypatch):
    """Each step tells something and none ends the request: only its cancellation does."""
    engine = server.engine._engines[0]

    def steps_forever():
        time.sleep(0.005)
        return list(engine._waiting)

    monkeypatch.setattr(engine, "step", steps_forever)
    body = json.dumps({"prompt": "x", "max_tokens": 390}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while not server.engine.busy:
            time.sleep(0.01)
    wait_until_idle(server)
    assert [generation.finish for generation in engine._waiting] == ["cancelled"]


def test_more_connections_are_served_than_select_can_watch(server, model, monkeypatch):
    """Beside a thousand others a connection has a descriptor that ``select`` refuses."""
    monkeypatch.setattr("megarat.infer.server._POLL_S", 0.0)  # every update looks whether the client is still there
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with contextlib.ExitStack() as others:
        for _ in range(1100):
            others.enter_context(open(os.devnull))
        answer = ask(server, {"prompt": "hello", "max_tokens": 12, "temperature": 0})[1]
        body = json.dumps({"prompt": "x", "max_tokens": 390, "n": 3, "temperature": 0, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as gone:
            gone.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            gone.recv(64)
        wait_until_idle(server)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answer["choices"][0]["text"] == expected(model, "hello", 12)


def test_the_extremes_of_drawing_are_served(server):
    """Numbers that are allowed, but 0 or infinite in fp32."""
    for body in ({"temperature": 1e-39}, {"temperature": 1e300}, {"top_p": 1e-50}, {"seed": -(2**70)}):
        status, tree = ask(server, {"prompt": "x", "max_tokens": 5, **body})
        assert status == 200 and tree["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_body_that_never_comes_whole_disturbs_nobody(server, model):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = ask(server, {"prompt": "hello", "max_tokens": 3, "temperature": 0})[1]
    assert answer["choices"][0]["text"] == expected(model, "hello", 3)


def test_many_clients_get_their_own_text_while_others_disconnect(server, model):
    results: dict[int, str] = {}

    def client(number: int) -> None:
        body = {"prompt": f"client {number}", "max_tokens": 8 + number, "temperature": 0}
        if number % 3 == 2:
            data = json.dumps({**body, "max_tokens": 300, "stream": True}).encode()
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=120) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        elif number % 3:
            results[number] = ask(server, body)[1]["choices"][0]["text"]
        else:
            results[number] = "".join(event["choices"][0]["text"] for event in stream(server, body))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {n: expected(model, f"client {n}", 8 + n) for n in range(12) if n % 3 != 2}
    wait_until_idle(server)


def test_a_failed_step_is_told_to_those_who_wait_and_the_next_are_served(server, model, monkeypatch, capsys):
    engine = server.engine._engines[0]

    def fail():
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", fail)
    status, tree = ask(server, {"prompt": "x", "max_tokens": 4})
    assert status == 500 and "out of memory" in tree["error"]["message"] and tree["error"]["type"] == "server_error"
    assert ask(server, {"prompt": "hello", "max_tokens": 3, "temperature": 0})[1]["choices"][0]["text"] == expected(
        model, "hello", 3
    )


def test_a_port_in_use_is_refused(server, model):
    engine = Engine(model, READING, Bytes(), rows=1, capacity=8)
    with pytest.raises(UserError, match=f"--port {server.server_port}: cannot listen there"):
        Server([engine], Bytes(), "x", "127.0.0.1", server.server_port)
    with pytest.raises(UserError, match="--port 70000: cannot listen there"):
        Server([engine], Bytes(), "x", "127.0.0.1", 70000)


def test_the_command_serves_until_it_is_told_to_stop(golden_pth, tmp_path):
    from megarat.checkpoint.convert import import_upstream

    words = tiny_run.write_tokenizer(tmp_path / "words", ["<unk>", "<s>", "</s>", "one", "two"])
    import_upstream(golden_pth, tmp_path / "tiny", str(words))
    command = [
        sys.executable,
        "-m",
        "megarat",
        "serve",
        str(tmp_path / "tiny"),
        "--port",
        "0",
        "--rows",
        "2",
        "--max-length",
        "64",
    ]
    process = subprocess.Popen(
        [*command, "--pattern", "D=16", "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        head = process.stderr.readline()
        assert "D=16,W=0,I=0; 2 rows of 64 tokens, 0.0 MiB of cache" in head, head
        port = int(re.search(r":(\d+)/v1", process.stderr.readline())[1])
        status, tree = ask(type("Address", (), {"server_port": port}), {"prompt": "one two", "max_tokens": 4})
        assert status == 200 and len(tree["choices"]) == 1
        body = json.dumps({"prompt": "one", "max_tokens": 60, "stream": True}).encode()
        connection = socket.create_connection(("127.0.0.1", port), timeout=120)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        connection.recv(64)
    finally:
        process.send_signal(signal.SIGTERM)  # while a request is being served
    assert process.wait(timeout=120) == 0
    connection.close()

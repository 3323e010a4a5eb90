"""``megarat serve``: an OpenAI-compatible completions endpoint over the continuous-batching engine, for one node.

    POST /v1/completions     prompt (text, a list of texts, token ids, a list of lists of them), max_tokens, temperature, top_p, n, seed,
                             stop, stream, stream_options.include_usage; repetition_penalty and pattern as extensions
    GET  /v1/models          the one model
    GET  /health             {"status": "ok"}

Each pattern that is served has an engine of its own; a request names one, or gets the first. One thread steps the engines; every connection
has its own, which waits for text of its requests. A client that goes away cancels its requests.
What a request asks for and cannot have is answered with status 400 and one line, and nobody else notices.
"""

from __future__ import annotations

import json
import math
import queue
import select
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.engine import Engine, Generation, Request
from megarat.infer.reading import AnySpec, read_as
from megarat.infer.sampling import Sampling

_MAX_BODY = 64 << 20  # bytes of a request
_MAX_CHOICES = 128  # prompts x n of a request
_POLL_S = 0.2  # between looks at whether a waiting client is still there
_DEFAULT_TOKENS = 16  # as OpenAI's
_UNSUPPORTED = ("logprobs", "echo", "suffix", "logit_bias", "presence_penalty", "frequency_penalty")


class Update(NamedTuple):
    """How far one generation of a request has come. ``text`` is all of it."""

    choice: int
    text: str
    finish: str | None


class EngineThread(threading.Thread):
    """Steps the engines as long as there is something to do."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(name="megarat-engine", daemon=True)
        self._engines = engines
        self._listeners: dict[Generation, tuple[int, queue.Queue[Update | Exception]]] = {}
        self._lock = threading.Lock()  # over submitting and telling, not over computing
        self._work = threading.Event()
        self._stopping = False

    def stop(self) -> None:
        """End after the step in progress: an interpreter must not leave while a thread computes. Those who still wait hear of it."""
        self._stopping = True
        self._work.set()
        self.join()
        self._fail(RuntimeError("the server is stopping"))

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or decoding."""
        return any(engine.busy for engine in self._engines)

    def submit(self, engine: Engine, requests: list[Request]) -> tuple[list[Generation], queue.Queue[Update | Exception]]:
        """Queue requests at an engine; their updates come through one queue. Raises ``UserError``, with none of them queued, where one is impossible."""
        updates: queue.Queue[Update | Exception] = queue.Queue()
        generations: list[Generation] = []
        with self._lock:
            try:
                for index, request in enumerate(requests):
                    generations.append(engine.submit(request))
                    self._listeners[generations[-1]] = (index, updates)
            except UserError:
                self._forget(generations)
                raise
        self._work.set()
        return generations, updates

    def cancel(self, generations: list[Generation]) -> None:
        """Nobody waits for these any more."""
        with self._lock:
            self._forget(generations)

    def _forget(self, generations: list[Generation]) -> None:
        for generation in generations:
            generation.cancel()
            self._listeners.pop(generation, None)

    def run(self) -> None:
        """Step, tell, and wait where there is nothing to do."""
        while not self._stopping:
            self._work.wait()
            self._work.clear()
            while self.busy and not self._stopping:
                for engine in self._engines:
                    if engine.busy:
                        self._step(engine)

    def _step(self, engine: Engine) -> None:
        try:
            moved = engine.step()
        except Exception as error:  # a fault of the machine, such as memory: those who wait hear of it, those who come are served
            self._fail(error)
            return
        with self._lock:
            for generation in moved:
                self._tell(generation)

    def _tell(self, generation: Generation) -> None:
        listener = self._listeners.get(generation)
        if listener is not None:
            listener[1].put(Update(listener[0], generation.text, generation.finish))
            if generation.finish is not None:
                del self._listeners[generation]

    def _fail(self, error: Exception) -> None:
        with self._lock:
            for generation, (_, updates) in self._listeners.items():
                generation.cancel()
                updates.put(error)
            self._listeners.clear()


@dataclass(frozen=True)
class Completion:
    """A parsed request of a client."""

    requests: list[Request]
    pattern: str | None
    stream: bool
    include_usage: bool


def parse_completion(body: Any, tokenizer: Tokenizer) -> Completion:
    """The engine's requests for what a client sent. Raises ``UserError`` that names the field."""
    if not isinstance(body, dict):
        raise UserError(f"the body: expected a JSON object, found {type(body).__name__}")
    for name in _UNSUPPORTED:
        if body.get(name):
            raise UserError(f"{name}: is not supported by this server; leave it out")
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise UserError("best_of: is not supported by this server; leave it out")
    n = _number(body, "n", int, 1)
    prompts = _prompts(body.get("prompt"), tokenizer)
    if not 1 <= n * len(prompts) <= _MAX_CHOICES:
        raise UserError(f"n: {len(prompts)} prompts x {n}; expected 1 to {_MAX_CHOICES} completions a request")
    seed = _number(body, "seed", int, None)
    seed = uuid.uuid4().int % 2**63 if seed is None else seed % 2**63
    temperature, top_p = _number(body, "temperature", float, 1.0), _number(body, "top_p", float, 1.0)
    penalty, most = _number(body, "repetition_penalty", float, 1.0), _number(body, "max_tokens", int, _DEFAULT_TOKENS)
    requests = [
        Request(
            ids,
            most,
            Sampling(temperature, top_p, penalty, (seed + choice) % 2**63),
            (tokenizer.eos_id,),
            _stops(body.get("stop")),
        )
        for ids in prompts
        for choice in range(n)
    ]
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError('stream_options: expected an object such as {"include_usage": true}')
    pattern = body.get("pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise UserError("pattern: expected a text such as 'D=16,W=256,I=4'")
    return Completion(requests, pattern, bool(body.get("stream")), bool(options.get("include_usage")))


def _prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each prompt, without BOS as in training."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            return tokenizer.encode(prompt)
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(ids, list) and _are_ids(ids) for ids in prompt):
            return prompt
    raise UserError("prompt: expected a text, a list of texts, a list of token ids or a list of such lists")


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise UserError("stop: expected a text or a list of texts")
    return tuple(text for text in stops if text)


def _number(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or kind(value) != value:
        raise UserError(f"{name}: found {value!r}; expected {'a whole number' if kind is int else 'a number'}")
    return kind(value)


class Server(ThreadingHTTPServer):
    """The endpoint. ``port`` 0 takes any free port; ``server_address`` says which."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, engines: Sequence[Engine], tokenizer: Tokenizer, name: str, host: str, port: int) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._by_reading = {str(engine.reading): engine for engine in engines}
        self.engine = EngineThread(engines)
        self.engine.start()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            self.engine.stop()
            raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
        self.started = int(time.time())

    @property
    def patterns(self) -> list[str]:
        """The patterns that are served, the default first."""
        return list(self._by_reading)

    def engine_for(self, pattern: str | None) -> Engine:
        """The engine that reads by ``pattern``; None is the first. Raises ``UserError`` that names those there are."""
        engines = list(self._by_reading.values())
        if pattern is None:
            return engines[0]
        found = self._by_reading.get(str(read_as(pattern, engines[0].config)))
        if found is None:
            raise UserError(f"pattern: {pattern!r} is not served here; this server has {', '.join(self._by_reading)}")
        return found

    def server_close(self) -> None:
        """Close the socket and end the engine's thread."""
        super().server_close()
        self.engine.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is everyday life; anything else is printed as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 120  # seconds a connection may say nothing

    def do_GET(self) -> None:
        """Models and health."""
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "megarat"}
            self._send(200, {"object": "list", "data": [model | {"patterns": self.server.patterns}]})
        else:
            self._refuse(404, f"{self.path}: no such page; there are /v1/completions, /v1/models and /health")

    def do_POST(self) -> None:
        """Completions."""
        body = self._read_body()
        if body is None:
            return None
        if self.path != "/v1/completions":
            return self._refuse(404, f"{self.path}: no such page; completions are at /v1/completions")
        try:
            completion = parse_completion(json.loads(body), self.server.tokenizer)
            engine = self.server.engine_for(completion.pattern)
            generations, updates = self.server.engine.submit(engine, completion.requests)
        except (ValueError, RecursionError) as error:
            return self._refuse(400, f"the body is not JSON: {error}")
        except UserError as error:
            return self._refuse(400, str(error))
        try:
            self._answer(completion, generations, updates)
        finally:
            self.server.engine.cancel(generations)

    def _read_body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True  # what follows cannot be told from a next request
            self._refuse(400, f"Content-Length is {length!r}; expected the bytes of the body, at most {_MAX_BODY}")
            return None
        return self.rfile.read(int(length))

    def _answer(self, completion: Completion, generations: list[Generation], updates: queue.Queue[Update | Exception]) -> None:
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.server.name,
        }
        if completion.stream:
            return self._stream(head, completion, generations, updates)
        try:
            for _ in self._updates(generations, updates):
                pass
        except RuntimeError as error:
            return self._refuse(500, str(error))
        choices = [_choice(index, generation.text, generation.finish) for index, generation in enumerate(generations)]
        return self._send(200, head | {"choices": choices, "usage": _usage(generations)})

    def _stream(
        self,
        head: dict[str, Any],
        completion: Completion,
        generations: list[Generation],
        updates: queue.Queue[Update | Exception],
    ) -> None:
        """Server-sent events: the new text of each update, then the end of each choice, then [DONE]."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = [0] * len(generations)
        try:
            for index, text, finish in self._updates(generations, updates):
                if len(text) > sent[index] or finish:
                    self._event(head | {"choices": [_choice(index, text[sent[index] :], finish)]})
                    sent[index] = len(text)
        except RuntimeError as error:
            return self._event({"error": _error(str(error), "server_error")})
        if completion.include_usage:
            self._event(head | {"choices": [], "usage": _usage(generations)})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _updates(self, generations: list[Generation], updates: queue.Queue[Update | Exception]) -> Iterator[Update]:
        """Updates until every generation has ended. Raises ``ConnectionError`` when the client has gone, ``RuntimeError`` when the engine failed."""
        left = len(generations)
        while left:
            try:
                update = updates.get(timeout=_POLL_S)
            except queue.Empty:
                if _has_gone(self.connection):
                    raise ConnectionAbortedError("the client closed the connection") from None
                continue
            if isinstance(update, Exception):
                raise RuntimeError(f"the engine failed: {type(update).__name__}: {update}")
            left -= update.finish is not None
            yield update

    def _event(self, tree: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(tree).encode() + b"\n\n")
        self.wfile.flush()

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": _error(message, "invalid_request_error" if status < 500 else "server_error")})

    def _send(self, status: int, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request on stderr, without the date of the default."""
        print(f"{self.address_string()} {format % args}", file=sys.stderr)


def _has_gone(connection: socket.socket) -> bool:
    """Whether the other side has closed. A request that is already following does not mean so."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _usage(generations: list[Generation]) -> dict[str, int]:
    prompt = sum(len(generation.request.ids) for generation in generations)
    new = sum(len(generation.ids) for generation in generations)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": None, "code": None}


def serve(
    checkpoint: str,
    *,
    patterns: Sequence[AnySpec] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 16,
    max_length: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> None:
    """Serve a checkpoint under some patterns (none: its own) until SIGINT or SIGTERM.

    Raises ``UserError`` for what cannot be loaded, does not fit, or cannot listen.
    """
    import signal

    import torch

    from megarat.checkpoint.load import load_state
    from megarat.infer.cache import cache_bytes
    from megarat.infer.load import load
    from megarat.infer.text import find_tokenizer

    model = load(checkpoint, None, device, {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[precision])
    text = find_tokenizer(model, tokenizer)
    capacity = max_length or load_state(model.checkpoint).config.data.sequence_length
    engines = []
    for reading in dict.fromkeys([model.reading(pattern) for pattern in patterns] or [model.reading(None)]):
        size = cache_bytes(model.config, reading, capacity, model.lm.embedding.weight.dtype)
        print(
            f"{model.checkpoint}: {reading}; {rows} rows of {capacity} tokens, {rows * size / 2**20:,.1f} MiB of cache",
            file=sys.stderr,
        )
        engines.append(Engine(model.lm, reading, text, rows=rows, capacity=capacity))
    server = Server(engines, text, str(checkpoint), host, port)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"listening on http://{host}:{server.server_port}/v1/completions", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()

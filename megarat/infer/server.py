"""``megarat serve``: an OpenAI-compatible completions endpoint over the continuous-batching engine, for one node.

    POST /v1/completions     prompt (text, a list of texts, token ids, a list of lists of them), max_tokens, temperature, top_p, n, seed,
                             stop, stream, stream_options.include_usage; repetition_penalty and pattern as extensions
    GET  /v1/models          the one model
    GET  /health             {"status": "ok"}

Each pattern that is served has an engine of its own; a request names one, or gets the first. One thread steps the engines; every connection
has its own, which waits for text of its requests. A client that goes away cancels its requests. Ranks that share the model step along with
the first, which is the one that listens.
What a request asks for and cannot have is answered with status 400 and one line, and nobody else notices.
"""

from __future__ import annotations

import json
import math
import queue
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.infer.engine import Engine, Generation, Request
from megarat.infer.reading import AnySpec, Reading, read_as
from megarat.infer.sampling import Sampling
from megarat.infer.stepping import EngineThread, Update, Updates, follow

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from megarat.infer.load import LoadedModel

_MAX_BODY = 64 << 20  # bytes of a request
_DIGITS = 20  # of its length: int() refuses thousands of them
_MAX_CHOICES = 128  # prompts x n of a request
_MAX_STOPS = 64  # every one is looked for at every token
_POLL_S = 0.2  # between looks at whether a waiting client is still there
_DEFAULT_TOKENS = 16  # as OpenAI's
_LETTERS = 256  # of a token at most: a longer text need not be cut into tokens to be known as too long
_UNSUPPORTED = ("logprobs", "echo", "suffix", "logit_bias", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Completion:
    """A parsed request of a client."""

    requests: list[Request]
    pattern: str | None
    stream: bool
    include_usage: bool


def parse_completion(body: Any, tokenizer: Tokenizer, capacity: int) -> Completion:
    """The engine's requests for what a client sent, of at most ``capacity`` tokens. Raises ``UserError`` that names the field."""
    if not isinstance(body, dict):
        raise UserError(f"the body: expected a JSON object, found {type(body).__name__}")
    for name in _UNSUPPORTED:
        if body.get(name):
            raise UserError(f"{name}: is not supported by this server; leave it out")
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise UserError("best_of: is not supported by this server; leave it out")
    n = _number(body, "n", int, 1)
    prompts = _prompts(body.get("prompt"))
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
        for ids in _encoded(prompts, tokenizer, capacity)
        for choice in range(n)
    ]
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError('stream_options: expected an object such as {"include_usage": true}')
    pattern = body.get("pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise UserError("pattern: expected a text such as 'D=16,W=256,I=4'")
    return Completion(requests, pattern, bool(body.get("stream")), bool(options.get("include_usage")))


def _prompts(prompt: Any) -> list[str] | list[list[int]]:
    """Each prompt as it came."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            return prompt
        if _are_ids(prompt):
            return [prompt]
        if all(isinstance(ids, list) and _are_ids(ids) for ids in prompt):
            return prompt
    raise UserError("prompt: expected a text, a list of texts, a list of token ids or a list of such lists")


def _encoded(prompts: list[str] | list[list[int]], tokenizer: Tokenizer, capacity: int) -> list[list[int]]:
    """Token ids of each prompt, without BOS as in training."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if longest := next((len(text) for text in texts if len(text) > _LETTERS * capacity), None):
        raise UserError(f"prompt: {longest} characters are more than the {capacity} tokens allowed together can hold")
    if any(_has_half_a_character(text) for text in texts):
        raise UserError("prompt: holds half of a character (a lone surrogate such as \\ud800); send whole ones")
    return tokenizer.encode(texts) if texts else [ids for ids in prompts if isinstance(ids, list)]


def _has_half_a_character(text: str) -> bool:
    """JSON can spell what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _are_ids(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise UserError("stop: expected a text or a list of texts")
    if len(stops) > _MAX_STOPS:
        raise UserError(f"stop: found {len(stops)} texts; expected at most {_MAX_STOPS}")
    return tuple(text for text in stops if text)


def _number(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and kind(value) == value:
            return kind(value)
    except OverflowError:  # a whole number that no float can hold
        pass
    raise UserError(f"{name}: found {value!r:.80}; expected {'a whole number' if kind is int else 'a number'}")


class Server(ThreadingHTTPServer):
    """The endpoint. ``port`` 0 takes any free port; ``server_address`` says which."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, engines: Sequence[Engine], tokenizer: Tokenizer, name: str, host: str, port: int, group: ProcessGroup | None = None
    ) -> None:
        """``group``: the ranks that share the model, of which this is the first; the others ``follow``."""
        self.tokenizer, self.name = tokenizer, name
        self._by_reading = {str(engine.reading): engine for engine in engines}
        self.engine = EngineThread(engines, group, self.shut_down_soon)
        self.engine.start()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            self.engine.stop()
            raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
        self.started = int(time.time())

    @property
    def capacity(self) -> int:
        """Tokens of a prompt and its answer together, at most, under any of the patterns."""
        return max(engine.capacity for engine in self._by_reading.values())

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
            raise UserError(f"pattern: {pattern!r:.80} is not served here; this server has {', '.join(self._by_reading)}")
        return found

    def shut_down_soon(self) -> None:
        """End ``serve_forever``, from a thread that must not wait for it."""
        threading.Thread(target=self.shutdown, daemon=True).start()

    def server_close(self) -> None:
        """Close the socket and end the engine's thread."""
        super().server_close()
        self.engine.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or falls silent, is everyday life; anything else is printed as usual."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
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
            completion = parse_completion(json.loads(body), self.server.tokenizer, self.server.capacity)
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
        if not length.isdecimal() or len(length) > _DIGITS or int(length) > _MAX_BODY:
            self.close_connection = True  # what follows cannot be told from a next request
            self._refuse(400, f"Content-Length is {length!r:.80}; expected the bytes of the body, at most {_MAX_BODY}")
            return None
        return self.rfile.read(int(length))

    def _answer(self, completion: Completion, generations: list[Generation], updates: Updates) -> None:
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
        updates: Updates,
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

    def _updates(self, generations: list[Generation], updates: Updates) -> Iterator[Update]:
        """Updates until every generation has ended. Raises ``ConnectionError`` when the client has gone, ``RuntimeError`` when the engine failed."""
        left, looked = len(generations), time.monotonic()
        while left:
            if time.monotonic() - looked >= _POLL_S:
                if _has_gone(self.connection):
                    raise ConnectionAbortedError("the client closed the connection")
                looked = time.monotonic()
            try:
                update = updates.get(timeout=_POLL_S)
            except queue.Empty:
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
    look = select.poll()  # select() itself refuses descriptors from 1024 on, which a thousand clients have
    look.register(connection, select.POLLIN)
    return bool(look.poll(0)) and connection.recv(1, socket.MSG_PEEK) == b""


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
    tensor: int = 1,
) -> None:
    """Serve a checkpoint under some patterns (none: its own) until SIGINT or SIGTERM. ``tensor`` ranks share the model; the first listens.

    Raises ``UserError`` for what cannot be loaded, does not fit, or cannot listen.
    """
    import torch

    from megarat.infer.load import join_ranks, load
    from megarat.infer.text import find_tokenizer

    own_device, ranks = join_ranks(tensor, device)
    group = _ranks_of_one_model(tensor)
    model = load(
        checkpoint, None, own_device or device, {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[precision], ranks
    )
    text = find_tokenizer(model, tokenizer)
    readings = list(dict.fromkeys([model.reading(pattern) for pattern in patterns] or [model.reading(None)]))
    engines = _engines(model, readings, text, rows, max_length)
    if ranks.rank > 0:
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank hears them too, and says when it is over
            signal.signal(number, signal.SIG_IGN)
        assert group is not None
        follow(engines, group)
    else:
        _listen(Server(engines, text, str(checkpoint), host, port, group), host)


def _ranks_of_one_model(tensor: int) -> ProcessGroup | None:
    """A group on the host for the first rank's word, beside the one that computes."""
    if tensor == 1:
        return None
    from torch import distributed

    if distributed.get_world_size() != tensor:
        raise UserError(
            f"--tensor {tensor}: {distributed.get_world_size()} processes were started, but a server is one model; start {tensor} for it"
        )
    return distributed.new_group(backend="gloo")


def _engines(
    model: LoadedModel, readings: Sequence[Reading], tokenizer: Tokenizer, rows: int, max_length: int | None
) -> list[Engine]:
    """One for each reading, once what all of them take together is printed and known to fit."""
    from megarat.checkpoint.load import load_state
    from megarat.infer.cache import cache_bytes
    from megarat.infer.memory import check_fits

    capacity = max_length or load_state(model.checkpoint).config.data.sequence_length
    ranks, dtype, own = model.lm.ranks, model.lm.embedding.weight.dtype, len(model.lm.own_heads)
    shares = [
        range(rank * own, (rank + 1) * own) for rank in range(ranks.size)
    ]  # patterns may differ by head: the largest counts
    sizes = [max(cache_bytes(model.config, reading, capacity, dtype, share) for share in shares) for reading in readings]
    for reading, size in zip(readings, sizes, strict=True):
        if ranks.rank == 0:
            shared = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
            head = f"{model.checkpoint}: {reading}; {rows} rows of {capacity} tokens"
            print(f"{head}, {rows * size / 2**20:,.1f} MiB of cache{shared}", file=sys.stderr)
    check_fits(rows, sum(sizes), capacity, model.device)
    return [Engine(model.lm, reading, tokenizer, rows=rows, capacity=capacity) for reading in readings]


def _listen(server: Server, host: str) -> None:
    """Until a signal, or until the engine cannot go on, which is raised."""
    signal.signal(signal.SIGTERM, lambda *_: server.shut_down_soon())
    print(f"listening on http://{host}:{server.server_port}/v1/completions", file=sys.stderr, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    if server.engine.error is not None:
        raise server.engine.error

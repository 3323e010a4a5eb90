"""Text in, text out: tokenizer, sparse generation, streaming to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from megarat.checkpoint import load as checkpoints
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import UserError
from megarat.infer.cache import cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.load import LoadedModel, describe_shape, join_ranks, load
from megarat.infer.reading import Reading, ReadingSpec
from megarat.infer.sampling import Sampling


def print_continuation(
    checkpoint: str | Path,
    prompt: str,
    *,
    pattern: ReadingSpec | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    stops: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    tensor: int = 1,
) -> None:
    """Stream the continuation of ``prompt`` to stdout; model, speed and cache size go to stderr. ``tensor`` ranks share the model."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[precision]
    own_device, ranks = join_ranks(tensor, device)
    model = load(checkpoint, None, own_device or device, dtype, ranks)
    reading = model.reading(pattern)  # warns where the checkpoint was adapted to another one
    text = find_tokenizer(model, tokenizer)
    length = len(encode_prompt(model, text, prompt)) + max_new_tokens
    size = cache_bytes(model.config, reading, length, model.lm.embedding.weight.dtype)
    print(f"{describe_shape(model)}, pattern {reading}; cache for {length} tokens: {size / 2**20:.2f} MiB", file=sys.stderr)
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = continue_text(
        model, text, prompt, max_new_tokens, sampling, sys.stdout, reading=reading, stop_ids=stop_ids, stops=stops
    )
    seconds = time.perf_counter() - start
    print()
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)", file=sys.stderr)


def continue_text(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    out: TextIO | None = None,
    *,
    reading: Reading | None = None,
    stop_ids: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> int:
    """Write the continuation of ``prompt`` to ``out`` as it grows; returns the number of new tokens, the one that stopped it left out.

    It ends at EOS, at one of ``stop_ids`` or before one of ``stops``. ``reading`` None is the pattern given at load.
    """
    prompt_ids = encode_prompt(model, tokenizer, prompt)
    for stop_id in stop_ids:
        if not 0 <= stop_id < model.config.vocab:
            raise UserError(f"--stop-id: {stop_id} is no token; the model has 0 to {model.config.vocab - 1}")
    request = Request(prompt_ids, max_new_tokens, sampling, (tokenizer.eos_id, *stop_ids), tuple(filter(None, stops)))
    engine = Engine(model.lm, reading or Reading(model.patterns), tokenizer, rows=1, capacity=len(prompt_ids) + max_new_tokens)
    generation = engine.submit(request)
    shown = 0
    while engine.busy:
        engine.step()
        if out is not None and len(generation.text) > shown:
            print(generation.text[shown:], end="", flush=True, file=out)
            shown = len(generation.text)
    return len(generation.ids)


def encode_prompt(model: LoadedModel, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, without BOS as in training. Raises ``UserError`` when it is empty or has ids the model lacks."""
    ids = tokenizer.encode([prompt])[0]
    if not ids:
        raise UserError("--prompt: the text is empty; give at least one character")
    if max(ids) >= model.config.vocab:
        raise UserError(f"{tokenizer.file}: gives id {max(ids)}, but the model's vocabulary has {model.config.vocab} entries")
    return ids


def find_tokenizer(model: LoadedModel, given: str | Path | None) -> Tokenizer:
    """The tokenizer a user names, or the one stored with the checkpoint."""
    if given is not None:
        return load_tokenizer(given)
    folder = checkpoints.tokenizer_folder(model.checkpoint)
    if folder is None:
        raise UserError(
            f"{model.checkpoint}: holds no tokenizer; name one with --tokenizer (a SentencePiece .model or a Hugging Face folder)"
        )
    return load_tokenizer(folder)

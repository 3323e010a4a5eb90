"""Text in, text out: tokenizer, sparse generation, streaming to the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from megarat.checkpoint import load as checkpoints
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import UserError
from megarat.infer.generate import generate
from megarat.infer.load import LoadedModel, describe_model, load
from megarat.infer.sampling import Sampling
from megarat.model.pattern import PatternSpec


def print_continuation(
    checkpoint: str | Path,
    prompt: str,
    *,
    pattern: PatternSpec | None,
    max_new_tokens: int,
    sampling: Sampling,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> None:
    """Stream the continuation of ``prompt`` to stdout; model, speed and cache size go to stderr."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[precision]
    model = load(checkpoint, pattern, device, dtype)
    model.reading(pattern)  # warns where the checkpoint was adapted to another one
    text = find_tokenizer(model, tokenizer)
    prompt_length = len(encode_prompt(model, text, prompt))
    length = prompt_length + max_new_tokens
    print(f"{describe_model(model)}; cache for {length} tokens: {model.cache_bytes(length) / 2**20:.2f} MiB", file=sys.stderr)
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = continue_text(model, text, prompt, max_new_tokens, sampling, sys.stdout)
    seconds = time.perf_counter() - start
    print()
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)", file=sys.stderr)


def continue_text(
    model: LoadedModel, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling, out: TextIO | None = None
) -> int:
    """Write the continuation of ``prompt`` to ``out`` as it grows; returns the number of new tokens."""
    prompt_ids = encode_prompt(model, tokenizer, prompt)
    ids: list[int] = []
    shown = tokenizer.decode(prompt_ids)

    def show(text: str) -> None:
        nonlocal shown
        if out is not None:
            print(text.removeprefix(shown), end="", flush=True, file=out)
        shown = text

    def stream(next_B: Tensor) -> None:
        ids.append(int(next_B[0]))
        text = tokenizer.decode([*prompt_ids, *ids])
        if not text.endswith("�"):  # half of a multi-byte character: wait for the rest
            show(text)

    prompt_BT = torch.tensor([prompt_ids], device=model.device)
    generate(
        model.lm,
        prompt_BT,
        max_new_tokens,
        model.patterns,
        sampling=sampling,
        stop_id=tokenizer.eos_id,
        vocabulary=tokenizer.vocab_size,
        on_token=stream,
    )
    show(tokenizer.decode([*prompt_ids, *ids]))  # what was still waited for
    return len(ids)


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

"""A model, batches and a run small enough that a test of training takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from megarat.config import Config, from_dict
from megarat.data.format import Piece, ShardWriter, TokenizerInfo, token_dtype
from megarat.model.lm import RATPlusLM

LAYERS, HIDDEN, HEADS, VOCAB, LENGTH = 2, 16, 2, 64, 16


def config(**changes: Any) -> Config:
    """The tiny run; ``changes`` are sections, such as ``train={"pairs": 3}``, laid over it."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused", "device": "cpu"},
        "model": {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "vocab": VOCAB},
        "attention": {"train_dilation": 4},
        "data": {"shards": "unused", "sequence_length": LENGTH},
        "train": {"pairs": 10, "global_batch": 4, "micro_batch": 2, "seed": 7, "precision": "fp32"},
        "optim": {"lr": 1e-2, "clip": 0.5},
        "log": {"progress": False, "tensorboard": False},
    }
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    return from_dict(tree)


def model(settings: Config, seed: int = 0) -> RATPlusLM:
    return RATPlusLM(settings.model).initialise(seed)


def micro_batches(count: int, seed: int = 0, rows: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` micro-batches of random tokens, with one label in each row left out as after an EOS."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, 5] = -100
        batches.append((tokens[:, :-1].contiguous(), labels))
    return batches


def write_tokenizer(folder: Path, words: Sequence[str]) -> Path:
    """A Hugging Face tokenizer of whole words under ``folder``, which is made; the first word stands for every unknown one; returns ``folder``."""
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = Whitespace()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


NO_TOKENIZER = TokenizerInfo("none", "sentencepiece", "0" * 64)


def write_shards(folder: Path, tokens: int = 3000, seed: int = 0, tokenizer: TokenizerInfo = NO_TOKENIZER) -> Path:
    """A corpus of random documents under ``folder/train``, id 2 closing each, said to be made with ``tokenizer``; returns ``folder``."""
    generator = np.random.default_rng(seed)
    stream = generator.integers(3, VOCAB, tokens).astype(token_dtype(VOCAB))
    ends = np.arange(50, tokens + 1, 50)
    stream[ends - 1] = 2
    with ShardWriter(folder / "train", vocab_size=VOCAB, eos_id=2, tokenizer=tokenizer) as writer:
        writer.add(Piece(stream, ends))
        writer.finish({"seed": seed})
    return folder

"""Bring foreign checkpoints into the canonical form: a ``.pth`` of the published code, or a folder that ``checkpoint export`` wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megarat.checkpoint.export import PREFIX
from megarat.checkpoint.safetensors import INDEX, SINGLE, read_model
from megarat.checkpoint.save import save_imported
from megarat.checkpoint.tokenizer_export import SENTENCEPIECE_COPY
from megarat.checkpoint.upstream import read_upstream
from megarat.config import ModelConfig
from megarat.data.tokenizer import load_tokenizer
from megarat.errors import UserError
from megarat.model import names
from megarat.model.pattern import resolve

_CONFIG = "config.json"
_SHAPE = {  # key of config.json -> key of the model's config
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "vocab_size": "vocab",
    "recurrence": "recurrence",
    "rope_base": "rope_base",
    "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}


def import_checkpoint(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> str:
    """Convert a ``.pth`` or an exported folder into a checkpoint folder ``out``; returns one line that says what was read.

    Only weights are taken; they become fp32, which changes none. ``tokenizer`` is stored with them; None: the one of an exported folder.
    Raises ``UserError`` for what is no such file or folder, is damaged, and for an ``out`` that exists.
    """
    read = import_exported if Path(source).is_dir() else import_upstream
    return read(source, out, tokenizer)


def import_upstream(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> str:
    """The same for a ``.pth`` of the published code."""
    return _store(Path(source), Path(out), None if tokenizer is None else Path(tokenizer), *read_upstream(source))


def import_exported(source: str | Path, out: str | Path, tokenizer: str | Path | None = None) -> str:
    """The same for a folder that ``checkpoint export`` wrote."""
    with _tokenizer_of(Path(source), tokenizer) as stored:
        return _store(Path(source), Path(out), stored, *read_exported(Path(source)))


def _store(
    source: Path, out: Path, tokenizer: Path | None, model: ModelConfig, weights: dict[str, Tensor], told: dict[str, Any]
) -> str:
    if tokenizer is not None and (entries := load_tokenizer(tokenizer).vocab_size) > model.vocab:
        raise UserError(f"--tokenizer {tokenizer}: has {entries} entries, but the model's vocabulary has {model.vocab}")
    folder = save_imported(out, model, weights, source=source, told=told, tokenizer=tokenizer)
    kind = "RAT+" if model.recurrence else "attention-only"
    return f"{source} -> {folder}: {kind}, {model.layers} layers x {model.hidden}, {model.heads} heads, vocabulary {model.vocab}"


@contextlib.contextmanager
def _tokenizer_of(source: Path, given: str | Path | None) -> Iterator[Path | None]:
    """What is to be stored: the one given, or that of the exported folder, the original where it is there."""
    if given is not None:
        yield Path(given)
    elif (source / SENTENCEPIECE_COPY).is_file():
        yield source / SENTENCEPIECE_COPY
    elif (source / "tokenizer.json").is_file():
        with tempfile.TemporaryDirectory() as alone:
            for file in source.glob("tokenizer*.json"):
                shutil.copy(file, alone)
            yield Path(alone)
    else:
        yield None


def read_exported(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any]]:
    """The model's shape, its weights by logical name (views of the mapped files) and what the folder says of its pattern and step.

    Raises ``UserError`` for a folder that ``checkpoint export`` (or transformers, from such a model) did not write, and for a damaged one.
    """
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        raise UserError(
            f"{folder}: neither a .pth file of the published RAT+ code nor a folder with {SINGLE} that checkpoint export wrote"
        )
    config = _read_config(folder / _CONFIG)
    model = _model_config(folder / _CONFIG, config)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in read_model(folder).items()}
    shapes = names.logical_shapes(model)
    for name in {**shapes, **weights}:
        found, needed = (tuple(weights[name].shape) if name in weights else "missing"), shapes.get(name, "none")
        if found != needed:
            raise UserError(f"{folder}: {PREFIX}{name} is {found}; the model of {_CONFIG} needs {needed}")
    pattern = config.get("pattern", "dense")
    resolve(pattern, model.layers, model.heads)
    written = config.get("megarat")
    pair = written.get("pair") if isinstance(written, Mapping) else None
    return model, weights, {"step": pair, "pattern": pattern, "sequence_length": config.get("max_position_embeddings")}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("model_type") != "ratplus":
        found = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: model_type is {found!r}; only RAT+ models (ratplus) can be imported")
    return config


def _model_config(path: Path, config: dict[str, Any]) -> ModelConfig:
    """The shape in megarat's words; a key that is absent or of another type is refused by name."""
    kinds = {item.name: type(getattr(ModelConfig(), item.name)) for item in dataclasses.fields(ModelConfig)}
    values: dict[str, Any] = {}
    for key, name in _SHAPE.items():
        value = config.get(key)
        if kinds[name] is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kinds[name]) or type(value) is not kinds[name] or (kinds[name] is not bool and value <= 0):
            raise UserError(f"{path}: {key} is {value!r}; expected {kinds[name].__name__}, above 0")
        values[name] = value
    width, inner = values["hidden"], config.get("intermediate_size")
    if width % (2 * values["heads"]) or type(inner) is not int or inner <= 0 or inner % width:
        raise UserError(
            f"{path}: hidden_size = {width}, num_attention_heads = {values['heads']} and intermediate_size = {inner!r} are no RAT+ model:"
            " heads have an even number of channels, and the inner width is a multiple of the width"
        )
    values["residual_dtype"] = "fp32" if config.get("residual_in_fp32", True) else "compute"
    return ModelConfig(ffn_multiple=inner // width, **values)

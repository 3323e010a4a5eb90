"""A checkpoint as a Hugging Face folder: safetensors, tokenizer, two Python files, and a card with the proof that both compute the same.

    OUT/
      model.safetensors            or model-00001-of-0000N.safetensors and model.safetensors.index.json; "model." + logical name
      config.json                  shape, pattern, where it came from; auto_map names the two Python files
      generation_config.json       where an answer ends
      configuration_ratplus.py, modeling_ratplus.py
      tokenizer.json, tokenizer_config.json (and tokenizer.model, if the tokenizer was SentencePiece's)
      README.md                    how to use it, and how far its logits are from megarat's

The whole model is never on the host: tensors are written one by one, and the comparison runs both models layer by layer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import megarat
from megarat.checkpoint import huggingface
from megarat.checkpoint.load import StoredWeights, identity, load_state, resolve, tokenizer_folder
from megarat.checkpoint.manifest import STAGING_PREFIX, CheckpointState
from megarat.checkpoint.safetensors import locate, read_file, write_model
from megarat.checkpoint.tokenizer_export import Probes, export_tokenizer
from megarat.config import ModelConfig
from megarat.data.tokenizer import Tokenizer
from megarat.errors import UserError
from megarat.files import sync
from megarat.model import names
from megarat.model.lm import RATPlusLM
from megarat.model.pattern import PatternSpec, describe
from megarat.model.pattern import resolve as resolve_pattern

PREFIX = "model."  # transformers' name of a tensor is this and the logical name
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CODE = ("configuration_ratplus.py", "modeling_ratplus.py")

_TOKENS = 512  # compared
_OTHER_PATTERN = "D=16,W=32,I=4"  # compared too where the model's own is dense; else dense is
_MOST = 1e-3  # of the logits' norm: fp32 arithmetic in another order stays far below, a wrong model far above


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits for the same tokens are apart."""

    what: str
    pattern: str
    largest: float  # difference of two logits
    relative: float  # norm of all differences by the norm of all logits
    same_choice: float  # share of the positions with the same most likely token

    def row(self) -> str:
        """A row of the card's table."""
        return f"| {self.what} | {self.pattern} | {self.largest:.2e} | {self.relative:.2e} | {100 * self.same_choice:.2f} % |"


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    pattern: PatternSpec | None = None,
    tokenizer: str | Path | None = None,
    compare: bool = True,
) -> str:
    """Write ``out`` from a checkpoint or a run folder; returns what to tell.

    ``dtype``: "bf16" or "fp32"; None: as trained. ``pattern``: what the exported model reads by unless told otherwise; None: the checkpoint's
    own. ``tokenizer``: file or folder; None: the one stored with the checkpoint. Raises ``UserError`` when there is no whole checkpoint, ``out``
    exists, the pattern does not fit, the tokenizer cannot be written, the disk refuses, or logits are to be compared without transformers.
    """
    folder, out = resolve(source), Path(out)
    state = load_state(folder)
    model = state.config.model
    spec = state.config.attention.pattern if pattern is None else pattern
    patterns = resolve_pattern(spec, model.layers, model.heads)
    if out.exists():
        raise UserError(f"{out} exists; name a new folder for the exported model")
    if compare and importlib.util.find_spec("transformers") is None:
        raise UserError(
            "checkpoint export: comparing logits needs transformers; pip install 'transformers>=4.57' (or megarat[export]), or give --no-compare"
        )
    dtype = dtype or state.precision
    with _commit(out) as staging:
        told = _write_tokenizer(tokenizer or tokenizer_folder(folder), staging, state)
        _write_weights(StoredWeights(folder, prefer_masters=dtype == "fp32"), staging, DTYPES[dtype])
        _write_code(staging)
        _write_configs(staging, state, spec, dtype, told[0] if told else None, identity(folder))
        agreements = _compare(folder, staging, model, spec, DTYPES[dtype]) if compare else []
        card = _card(out.name, state, describe(patterns), dtype, told, agreements)
        (staging / "README.md").write_text(card, encoding="utf-8")
    lines = [f"{folder} -> {out}: {dtype}, pattern {describe(patterns)}"]
    lines += ["" if told else f"{folder} holds no tokenizer, and none was named with --tokenizer: the folder has none"]
    lines += [
        f"{row.what}, {row.pattern}: logits differ by at most {row.largest:.2e}, {row.relative:.2e} of their norm"
        for row in agreements
    ]
    return "\n".join(line for line in lines if line)


# ---- what is written --------------------------------------------------------------------------------------------------------


def _write_tokenizer(source: str | Path | None, staging: Path, state: CheckpointState) -> tuple[Tokenizer, Probes] | None:
    if source is None:
        return None
    tokenizer, probes = export_tokenizer(Path(source), staging, state.config.data.sequence_length)
    if tokenizer.vocab_size > state.config.model.vocab:
        raise UserError(
            f"{tokenizer.file}: has {tokenizer.vocab_size} entries, but the model's vocabulary has {state.config.model.vocab}"
        )
    return tokenizer, probes


def _write_weights(weights: StoredWeights, staging: Path, dtype: torch.dtype) -> None:
    shapes = {PREFIX + name: shape for name, shape in weights.shapes.items()}
    with tqdm(total=len(shapes), desc="writing", unit="tensor", disable=None) as bar:

        def read(name: str) -> Tensor:
            bar.update()
            return weights[name.removeprefix(PREFIX)]

        write_model(staging, shapes, dtype, read)


def _write_code(staging: Path) -> None:
    for name in CODE:
        shutil.copy(Path(huggingface.__file__).with_name(name), staging / name)


def _write_configs(
    staging: Path, state: CheckpointState, spec: PatternSpec, dtype: str, tokenizer: Tokenizer | None, content: str
) -> None:
    model = state.config.model
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    config = {
        "architectures": ["RATPlusForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ratplus.RATPlusConfig",
            "AutoModel": "modeling_ratplus.RATPlusModel",
            "AutoModelForCausalLM": "modeling_ratplus.RATPlusForCausalLM",
        },
        "model_type": "ratplus",
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": model.ffn_multiple * model.hidden,
        "recurrence": model.recurrence,
        "pattern": _plain(spec),
        "rope_base": model.rope_base,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "residual_in_fp32": model.residual_dtype == "fp32",
        "max_position_embeddings": state.config.data.sequence_length,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        **ends,
        "megarat": {
            "version": megarat.__version__,
            "checkpoint": content,
            "kind": state.kind,
            "pair": state.pair,
            "tokens": state.tokens,
        },
    }
    _write_json(staging / "config.json", config)
    _write_json(staging / "generation_config.json", {"bos_token_id": None, **ends})


def _plain(spec: Any) -> Any:
    """A pattern as JSON: strings, in lists where it is one."""
    return [_plain(entry) for entry in spec] if isinstance(spec, list) else str(spec)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _commit(out: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes ``out`` at the end of the block, or vanishes. A disk that refuses is a ``UserError``."""
    staging = out.with_name(f"{STAGING_PREFIX}{out.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process that had this number: in a container all have the same
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():
            sync(file)
        sync(staging)
        staging.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after the rename there is nothing to remove


# ---- the comparison ---------------------------------------------------------------------------------------------------------


def _compare(folder: Path, exported: Path, model: ModelConfig, spec: PatternSpec, dtype: torch.dtype) -> list[Agreement]:
    """Logits of the exported files and code against megarat's own, in fp32 arithmetic; and what rounding to bf16 costs.

    Raises ``RuntimeError`` where the two models do not compute the same.
    """
    length = min(_TOKENS, 8 * model.vocab)
    ids_BT = torch.randint(model.vocab, (1, length), generator=torch.Generator().manual_seed(0))
    own = StoredWeights(folder, prefer_masters=dtype == torch.float32)
    dense = describe(resolve_pattern(spec, model.layers, model.heads)) == "dense"
    found = []
    for each in (spec, _OTHER_PATTERN if dense else "dense"):
        ours = _megarat_logits(model, lambda name: own[name].to(dtype), ids_BT, each)
        theirs = _exported_logits(exported, ids_BT, each)
        found.append(_agreement("the same weights", model, each, theirs, ours))
        if not found[-1].relative < _MOST:  # NaN too
            raise RuntimeError(f"{exported}: computes other logits than the checkpoint: {found[-1]}")
    precise = StoredWeights(folder, prefer_masters=True)
    if dtype == torch.bfloat16 and precise.dtype == torch.float32:
        ours = _megarat_logits(model, precise.__getitem__, ids_BT, spec)
        found.append(_agreement("the fp32 weights before rounding", model, spec, _exported_logits(exported, ids_BT, spec), ours))
    return found


def _agreement(what: str, model: ModelConfig, spec: PatternSpec, left_BTV: Tensor, right_BTV: Tensor) -> Agreement:
    difference = left_BTV - right_BTV
    same = (left_BTV.argmax(dim=-1) == right_BTV.argmax(dim=-1)).double().mean()
    relative = difference.norm() / right_BTV.norm()
    words = describe(resolve_pattern(spec, model.layers, model.heads))
    return Agreement(what, words, float(difference.abs().max()), float(relative), float(same))


@torch.no_grad()
def _megarat_logits(model: ModelConfig, read: Callable[[str], Tensor], ids_BT: Tensor, spec: PatternSpec) -> Tensor:
    """Logits (B, T, V) of the checkpoint's weights, in fp32."""
    with torch.device("meta"):
        lm = RATPlusLM(model)

    def read_runtime(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.cat([read(piece).float() for piece in names.logical_names(name, shape)])

    with _layer_by_layer(lm, lm.blocks, read_runtime):
        return lm(ids_BT, resolve_pattern(spec, model.layers, model.heads))


@torch.no_grad()
def _exported_logits(exported: Path, ids_BT: Tensor, spec: PatternSpec) -> Tensor:
    """Logits (B, T, V) of an exported folder by the code that lies in it, in fp32."""
    from megarat.checkpoint.huggingface.configuration_ratplus import RATPlusConfig
    from megarat.checkpoint.huggingface.modeling_ratplus import RATPlusForCausalLM

    places = locate(exported)
    with torch.device("meta"):
        lm = RATPlusForCausalLM(RATPlusConfig.from_pretrained(exported)).eval()
    with _layer_by_layer(lm, lm.model.layers, lambda name, _: read_file(places[name])[name].float()):
        return lm(input_ids=ids_BT, pattern=_plain(spec), use_cache=False).logits


@contextlib.contextmanager
def _layer_by_layer(
    model: nn.Module, layers: Iterable[nn.Module], read: Callable[[str, tuple[int, ...]], Tensor]
) -> Iterator[None]:
    """Let a model on the meta device run: each of ``layers`` has its weights only while it runs, what lies outside them until the end."""
    prefixes = {module: name + "." for name, module in model.named_modules()}
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    for name, parameter in list(model.named_parameters()):
        if parameter not in inside:
            _set_parameter(model, name, read(name, tuple(parameter.shape)))

    def fill(layer: nn.Module, _: Any) -> None:
        for name, parameter in list(layer.named_parameters()):
            _set_parameter(layer, name, read(prefixes[layer] + name, tuple(parameter.shape)))

    def empty(layer: nn.Module, *_: Any) -> None:
        layer.to("meta")

    hooks = [handle for layer in layers for handle in (layer.register_forward_pre_hook(fill), layer.register_forward_hook(empty))]
    try:
        yield
    finally:
        for hook in hooks:  # they hold the model in a circle, which would keep its embedding until the next collection
            hook.remove()
        model.to("meta")


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


# ---- the card ---------------------------------------------------------------------------------------------------------------

_USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
model.set_pattern("D=16,W=256,I=4")  # or "dense", or a list with one pattern a layer (or a list of one a head)
prompt = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**prompt, max_new_tokens=50)))
```

A pattern (D, W, I) lets the token at position i read position j <= i if i - j <= W, or j < I, or (j + 1) mod D = 0. The cache keeps only what the
pattern can still show: for D = 16 a sixteenth of the keys. The weights are the same for every pattern; `generate(..., pattern="D=64")` takes one for
a single call. Prompts of different lengths may be padded on the left."""


def _card(
    name: str,
    state: CheckpointState,
    pattern: str,
    dtype: str,
    told: tuple[Tokenizer, Probes] | None,
    agreements: list[Agreement],
) -> str:
    model = state.config.model
    parameters = sum(torch.Size(shape).numel() for shape in names.logical_shapes(model).values())
    kind = "RAT+" if model.recurrence else "attention-only"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [ratplus]",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind} language model ([arXiv 2602.18196](https://arxiv.org/abs/2602.18196)): {model.layers} layers x {model.hidden}, {model.heads} heads,"
        f" vocabulary {model.vocab}, {parameters:,} parameters, {dtype}. Read by the pattern `{pattern}` unless told otherwise."
        f" {_history(state)} Written by megarat {megarat.__version__}.",
        "",
        _USAGE,
        "",
        "## The same logits as megarat",
        "",
        *_card_of_agreement(agreements),
        *_card_of_tokenizer(told),
    ]
    return "\n".join(lines) + "\n"


def _history(state: CheckpointState) -> str:
    length = state.config.data.sequence_length
    if state.kind == "import":
        return f"Imported from weights of step {state.pair}."
    if state.kind == "adapt":
        return f"Adapted to the pattern {state.pattern} with {state.tokens:,} tokens in sequences of {length}."
    return f"Pretrained with {state.tokens:,} tokens in sequences of {length}."


def _card_of_agreement(agreements: list[Agreement]) -> list[str]:
    if not agreements:
        return ["Logits were not compared when this folder was written.", ""]
    return [
        f"These files, run by `modeling_ratplus.py`, against the checkpoint they come from, run by megarat: {_TOKENS} random tokens, both computed"
        " in fp32 on a CPU. The norm of the differences is given as a share of the norm of the logits.",
        "",
        "| against | pattern | largest difference | share of the norm | same most likely token |",
        "|---|---|---:|---:|---:|",
        *(agreement.row() for agreement in agreements),
        "",
    ]


def _card_of_tokenizer(told: tuple[Tokenizer, Probes] | None) -> list[str]:
    if told is None:
        return ["## Tokenizer", "", "None was stored with the checkpoint."]
    tokenizer, probes = told
    equal = "has the same ids for all" if not probes.differing else f"has other ids for {probes.differing}"
    return [
        "## Tokenizer",
        "",
        f"Made of `{tokenizer.file.name}`, and {equal} of {probes.texts:,} texts tried. Nothing is put before or behind a text, there is no BOS, and a"
        " text that spells a special token is a text, as in training.",
    ]

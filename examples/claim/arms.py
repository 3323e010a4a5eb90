"""The arms of the comparison, as keys of an ordinary config, and the patterns they are read under."""

from __future__ import annotations

from dataclasses import dataclass

from megarat import config as configuration
from megarat.config import Config
from megarat.errors import UserError

# A window beyond the sequence shows every key: the first pass of a pair is then dense, as the second.
_DENSE_TWICE = ("attention.train_dilation=-1", "attention.train_window=1000000")
_NO_RECURRENCE = ("model.recurrence=false",)
_ONE_UPDATE = ("attention.train_dilation=1",)

ARMS: dict[str, tuple[str, ...]] = {
    "ratplus": (),  # a sparse (D=64) and a dense update a batch
    "recurrence": _DENSE_TWICE,  # RAT+ without the sparse pass; two dense updates a batch, so that their number is the same
    "attention-pair": _NO_RECURRENCE,  # attention alone, trained like ratplus: the FLOP-matched joint training
    "attention": _NO_RECURRENCE + _DENSE_TWICE,  # attention alone, two dense updates a batch
    "recurrence-once": _ONE_UPDATE,  # the same two with one update a batch: half the updates and FLOPs, as in the anchor
    "attention-once": _NO_RECURRENCE + _ONE_UPDATE,
}
TITLES = {
    "ratplus": "(a) RAT+, sparse + dense pair",
    "recurrence": "(b) RAT+ without the sparse pass",
    "attention-pair": "(c) attention only, sparse + dense pair",
    "attention": "(d) attention only, dense",
    "recurrence-once": "(b1) as (b), one update a batch",
    "attention-once": "(d1) as (d), one update a batch",
}
WINDOWED = "D=16,W=256,I=4"
SINKS = "D=-1,W=256,I=4"
READINGS = ("dense", "D=4", "D=16", "D=64", WINDOWED, SINKS)
MILESTONE_READINGS = ("dense", "D=16", "D=64")  # of each checkpoint kept on the way
KIND_READINGS = ("dense", "D=16", "D=64", WINDOWED)  # of each kind of text
TOPK = tuple(f"D=-1 + topk blocks={blocks},size=64,score=max" for blocks in (3, 4, 8))

# Each fine-tuned from the weights adapted to it; PAIR: from the pretrained ones by pairs, read by top-k blocks. The most telling first.
PAIR = "pair"
NEEDLE_READINGS = ("D=16", PAIR, "D=64", "dense")
NEEDLE_TASKS = "single_1,single_2,multikey_1,multikey_2"

# Share of the pretraining's batches that an adaptation takes: a quarter of a percent, one percent, and the 48 of 1167 batches of the anchor.
TINY, SHORT, LONG = 0.0025, 0.01, 0.041
_HEADLINE = tuple((reading, share) for share in (LONG, SHORT) for reading in ("D=16", "D=64"))
_OTHERS = tuple((reading, share) for share in (LONG, SHORT) for reading in READINGS if reading not in ("D=16", "D=64"))
ADAPTATIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "none": (),
    "brief": _HEADLINE,
    "full": (*_HEADLINE, *_OTHERS, ("D=16", TINY), ("D=64", TINY)),
}


def pretraining(path: str, arm: str, overrides: tuple[str, ...] = ()) -> Config:
    """The config of an arm. Raises ``UserError``."""
    if arm not in ARMS:
        raise UserError(f"arm {arm!r}: expected one of {', '.join(ARMS)}")
    config = configuration.load(path, (*ARMS[arm], *overrides))
    config.run.dir = f"{config.run.dir}/{arm}-{config.train.seed}"
    return config


def batches_of(share: float, pairs: int) -> int:
    """Batches of an adaptation that takes a share of a pretraining's."""
    return max(1, round(share * pairs))


def adaptation(pretrain: Config, pattern: str, share: float) -> Config:
    """The published adaptation: fresh optimizer, a tenth of the learning rate, no warm-up; ``share`` of the batches of pretraining."""
    tree = pretrain.to_dict()
    batches = batches_of(share, pretrain.train.pairs)
    tree["run"]["dir"] = f"{pretrain.run.dir}-adapted/{pattern}-{share:g}"
    tree["attention"] = {"pattern": pattern}
    tree["train"]["pairs"] = batches
    tree["optim"] |= {"lr": pretrain.optim.lr / 10, "warmup": 0}
    return configuration.from_dict(tree)


@dataclass(frozen=True)
class NeedleTuning:
    """The fine-tuning on needle tasks."""

    batches: int = 300
    length: int = 1024
    global_batch: int = 32
    samples: int = 100  # of each task, scored
    readings: tuple[str, ...] = NEEDLE_READINGS  # one fine-tuning each, in this order


def needle_tuning(pretrain: Config, pattern: str, tuning: NeedleTuning, sparse_pass: bool) -> Config:
    """Fine-tuning of adapted weights on needle tasks under one pattern; or, with the sparse pass, of pretrained ones by pairs, as for top-k.

    As published, but for the learning rate and the number of batches: a model of this size has seen a thousandth of the tokens.
    """
    tree = pretrain.to_dict()
    tree["run"]["dir"] = f"{pretrain.run.dir}-needle/{pattern}{'-pair' if sparse_pass else ''}"
    tree["attention"] = {"pattern": pattern, "train_dilation": 64}
    tree["data"] |= {"task": f"needle:{NEEDLE_TASKS}", "sequence_length": tuning.length}
    tree["train"] |= {"pairs": tuning.batches, "global_batch": tuning.global_batch, "micro_batch": tuning.global_batch}
    tree["optim"] |= {"lr": pretrain.optim.lr / 5, "warmup": 0.05, "weight_decay": 0.01}
    return configuration.from_dict(tree)

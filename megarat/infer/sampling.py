"""How the next token of each row is drawn, on the device and without a word to the host.

Every row has its own temperature, nucleus, penalty and seed. The n-th token of a row is drawn with one number in [0, 1) that is a hash of
(seed, n) and of nothing else, so a request gets the same text in any company, in any row, on any device.

Shapes: B rows, V vocabulary (of the tokenizer: ids beyond it are never drawn).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megarat.errors import UserError

_COLDEST = 1e-6  # smaller temperatures are taken as this: logits over less than that are no numbers any more in fp32
_MILDEST, _HARSHEST = 0.01, 100.0  # repetition penalties, likewise


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ``temperature`` 0 is greedy; ``top_p`` keeps the smallest set of tokens of that probability.

    ``repetition_penalty`` divides positive and multiplies negative logits of the tokens generated so far; the prompt's are left alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        is_penalty = _MILDEST <= self.repetition_penalty <= _HARSHEST
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and is_penalty):  # so that NaN is refused too
            raise UserError(
                f"sampling: {self}: need temperature >= 0, 0 < top_p <= 1 and a repetition_penalty from {_MILDEST} to {_HARSHEST}"
            )

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the next token is just the largest logit."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0


GREEDY = Sampling()


class Draws(NamedTuple):
    """What the rows of a batch draw with; all on the device, so that a step captured in a CUDA graph reads what is current."""

    temperature_B: Tensor  # fp32
    top_p_B: Tensor  # fp32
    penalty_B: Tensor  # fp32
    seed_B: Tensor  # int64
    count_B: Tensor  # int64, tokens drawn so far
    seen_BV: Tensor  # bool, tokens generated so far

    @classmethod
    def of(cls, rows: int, vocabulary: int, device: torch.device | str) -> Draws:
        """Greedy rows."""
        ones_B, zeros_B = torch.ones(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        seen_BV = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        return cls(torch.zeros_like(ones_B), ones_B, ones_B.clone(), zeros_B, zeros_B.clone(), seen_BV)

    def rows(self, first: int, end: int) -> Draws:
        """Some of the rows; writing to them writes here."""
        return Draws(*(part[first:end] for part in self))

    def start(self, samplings: Sequence[Sampling]) -> None:
        """New requests in all of these rows."""
        parts = [(max(s.temperature, _COLDEST) if s.temperature else 0.0, s.top_p, s.repetition_penalty) for s in samplings]
        for target_B, values in zip(self[:3], zip(*parts, strict=True), strict=True):
            target_B.copy_(torch.tensor(values))
        self.seed_B.copy_(torch.tensor([_signed(s.seed) for s in samplings]))
        self.count_B.zero_()
        self.seen_BV.zero_()


def draw(logits_BV: Tensor, draws: Draws) -> Tensor:
    """The next token of each row (B,), int64; ``draws`` takes note of it."""
    penalty_B1 = draws.penalty_B[:, None].to(logits_BV.dtype)
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = torch.where(draws.seen_BV, penalised_BV, logits_BV)
    is_greedy_B = draws.temperature_B == 0
    temperature_B1 = draws.temperature_B.masked_fill(is_greedy_B, 1.0)[:, None].to(logits_BV.dtype)
    # stable: equal logits are common in bf16, and their order must not depend on the batch
    p_BV, order_BV = (logits_BV / temperature_B1).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    mass_BV = p_BV.cumsum(dim=-1)
    kept_B1 = (mass_BV - p_BV < draws.top_p_B[:, None]).sum(dim=-1, keepdim=True).clamp_min(1)  # a top_p may be 0 in fp32
    goal_B1 = uniform(draws.seed_B, draws.count_B)[:, None].to(p_BV.dtype) * mass_BV.gather(1, kept_B1 - 1)
    choice_B1 = (mass_BV <= goal_B1).sum(dim=-1, keepdim=True).minimum(kept_B1 - 1)
    next_B1 = torch.where(is_greedy_B[:, None], logits_BV.argmax(dim=-1, keepdim=True), order_BV.gather(1, choice_B1))
    draws.seen_BV.scatter_(1, next_B1, True)
    draws.count_B.add_(1)
    return next_B1[:, 0]


def uniform(seed_B: Tensor, count_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, count), fp64: SplitMix64's finaliser twice, in int64 that wraps around."""
    mixed_B = _mix(_mix(seed_B + _signed(0x9E3779B97F4A7C15)) + count_B * _signed(0xD1B54A32D192ED03))
    return _shift_right(mixed_B, 11).double() * 2.0**-53


def _mix(z_B: Tensor) -> Tensor:
    z_B = (z_B ^ _shift_right(z_B, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_B = (z_B ^ _shift_right(z_B, 27)) * _signed(0x94D049BB133111EB)
    return z_B ^ _shift_right(z_B, 31)


def _shift_right(z_B: Tensor, bits: int) -> Tensor:
    """Of 64 unsigned bits."""
    return (z_B >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return (value + 2**63) % 2**64 - 2**63

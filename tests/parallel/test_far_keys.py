"""Attention over a shared sequence by exchanged far keys, against the mask over the whole sequence in float64."""

from __future__ import annotations

import pytest
import torch

from megarat import comm, mesh
from megarat.model.pattern import Pattern
from megarat.ops.dilated_attention import dilated_attention_ref
from megarat.parallel import far_keys, worlds

BATCH, LENGTH, HEADS, CHANNELS = 2, 48, 2, 4
PATTERNS = (
    "D=4,W=0,I=0",
    "D=4,W=3,I=2",
    "D=4,W=4,I=0",
    "D=3,W=7,I=3",
    "D=2,W=5,I=1",
    "D=6,W=1,I=5",
    "D=-1,W=5,I=2",
    "D=-1,W=0,I=3",
)


def inputs() -> torch.Tensor:
    """q, k, v and the gradient of the output, of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, BATCH, LENGTH, HEADS, CHANNELS, generator=generator, dtype=torch.float64)


def on_a_segment(patterns: tuple[str, ...]) -> list[torch.Tensor]:
    """Of each pattern this rank's output and its gradients of q, k and v, stacked."""
    group = mesh.start("cpu").world
    found = []
    for text in patterns:
        whole = inputs().chunk(comm.size(group), dim=2)[comm.rank(group)]
        q, k, v = (x.clone().requires_grad_() for x in whole[:3])
        out = far_keys.attend(q, k, v, Pattern.parse(text), group)
        found.append(torch.stack([out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3])]))
    return found


def tokens_sent(text: str) -> int:
    """Keys and values that this rank hands over in a forward, as tokens of all heads."""
    group = mesh.start("cpu").world
    sent = []
    gather, exchange = torch.distributed.all_gather_into_tensor, torch.distributed.all_to_all_single

    def counted_gather(whole, part, **options):
        sent.append(part.numel() * (comm.size(group) - 1))
        return gather(whole, part, **options)

    def counted_exchange(received, given, *options, **named):
        sent.append(given.numel())
        return exchange(received, given, *options, **named)

    torch.distributed.all_gather_into_tensor, torch.distributed.all_to_all_single = counted_gather, counted_exchange
    q, k, v, _ = inputs().chunk(comm.size(group), dim=2)[comm.rank(group)]
    far_keys.attend(q, k, v, Pattern.parse(text), group)
    return sum(sent) // (2 * BATCH * HEADS * CHANNELS)


def on_one_process(text: str) -> torch.Tensor:
    q, k, v, dout = inputs()
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, _ = dilated_attention_ref(q, k, v, Pattern.parse(text))
    return torch.stack([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)])


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_query_sees_what_it_sees_in_the_whole_sequence(ranks):
    patterns = tuple(text for text in PATTERNS if far_keys.can_exchange(Pattern.parse(text), LENGTH // ranks))
    assert len(patterns) >= 7
    by_rank = worlds.run(ranks, on_a_segment, patterns)
    for index, text in enumerate(patterns):
        found = torch.cat([segments[index] for segments in by_rank], dim=2)
        torch.testing.assert_close(
            found, on_one_process(text), rtol=1e-12, atol=1e-12, msg=lambda told, text=text: f"{text}: {told}"
        )


def test_segments_that_have_no_room_for_the_exchange_are_told_apart():
    assert far_keys.can_exchange(Pattern(4, 3, 2), 8)
    assert not far_keys.can_exchange(Pattern(4, 3, 2), 6)  # no whole strides
    assert not far_keys.can_exchange(Pattern(4, 9, 0), 8)  # the window reaches beyond the neighbour
    assert not far_keys.can_exchange(Pattern(4, 3, 5), 8)  # initial tokens within the halo
    assert not far_keys.can_exchange(Pattern(), 8)


def test_only_far_keys_and_a_halo_travel():
    segment = LENGTH // 2
    assert worlds.run(2, tokens_sent, "D=4,W=0,I=0") == [segment // 4] * 2
    assert worlds.run(2, tokens_sent, "D=4,W=3,I=2") == [segment // 4 + 2 + 4, segment // 4 + 2]  # the last rank has no neighbour

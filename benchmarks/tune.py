"""Sweeps the kernels' tile tables: `python -m benchmarks.tune scan|attention|decode|norm [--compile I/N]`.

The winners are written by hand into the tables at the top of each kernel module, so that nothing is ever tuned inside a training step
and every rank makes the same choice. `--compile I/N` only compiles every N-th variant at a small shape, to fill Triton's cache from
several processes before the timing run. The scan's and the norm's variants are compared with float64 before they are timed.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.cases import decode_graph, relative_error
from benchmarks.measure import measure_ceilings, time_cuda
from megarat.ops import gated_scan, rotary_tables
from megarat.ops.kernels import decode_attention as decode
from megarat.ops.kernels import dilated_attention as attention
from megarat.ops.kernels import gated_scan as scan
from megarat.ops.kernels import rms_norm as norm


class Variant(NamedTuple):
    """What is timed, and how wrong a result of it is in units of its tolerance (at most 1 passes)."""

    name: str
    run: Callable[[], object]
    error: Callable[[Any], float] | None = None


# by shape: short ones with many columns, long ones with few
SCAN_FORWARD = {
    (8, 4096): [
        scan.Tile(64, 8, 8, 8, 128, 1), scan.Tile(64, 8, 8, 8, 128, 1, True), scan.Tile(64, 8, 8, 8, 128, 2, True), scan.Tile(64, 4, 8, 4, 128, 1, True),
        scan.Tile(64, 4, 8, 4, 128, 2, True), scan.Tile(64, 8, 4, 8, 80, 2, True),
    ],
    (1, 131072): [
        scan.Tile(32, 16, 8, 8, 128, 1), scan.Tile(32, 16, 8, 8, 128, 1, True), scan.Tile(32, 16, 8, 8, 128, 2, True),
        scan.Tile(64, 16, 8, 16, 128, 1), scan.Tile(64, 16, 8, 16, 128, 1, True), scan.Tile(64, 16, 8, 16, 128, 2, True),
        scan.Tile(64, 8, 8, 8, 128, 1, True), scan.Tile(64, 8, 8, 8, 128, 2), scan.Tile(64, 8, 8, 8, 128, 2, True),
        scan.Tile(64, 8, 8, 8, 128, 3, True), scan.Tile(64, 8, 8, 8, 128, 4, True), scan.Tile(64, 4, 8, 4, 128, 4, True),
        scan.Tile(32, 8, 8, 4, 128, 2, True), scan.Tile(64, 8, 4, 8, 80, 4, True), scan.Tile(64, 8, 16, 8, 255, 1), scan.Tile(64, 8, 16, 8, 255, 2),
        scan.Tile(64, 8, 16, 8, 255, 2, True), scan.Tile(32, 8, 16, 4, 255, 2, True), scan.Tile(32, 8, 16, 4, 255, 3, True),
        scan.Tile(64, 4, 16, 4, 255, 3, True), scan.Tile(32, 8, 16, 8, 128, 2, True), scan.Tile(32, 16, 16, 8, 255, 2),
    ],
}  # fmt: skip
SCAN_BACKWARD = {
    (8, 4096): [scan.Tile(64, 4, 8, 4, 255, 1), scan.Tile(64, 4, 8, 4, 255, 1, True), scan.Tile(64, 4, 8, 4, 255, 2, True)],
    (1, 131072): [
        scan.Tile(32, 8, 8, 4, 255, 2), scan.Tile(32, 8, 8, 4, 255, 1, True), scan.Tile(32, 8, 8, 4, 255, 2, True),
        scan.Tile(64, 4, 8, 4, 255, 2, True), scan.Tile(64, 4, 8, 4, 255, 4, True),
    ],
}  # fmt: skip
# (queries, keys, warps, stages, registers)
ATTENTION_FORWARD = [
    (64, 32, 4, 2, 128), (64, 32, 4, 2, 168), (64, 32, 4, 3, 128), (64, 16, 4, 3, 128), (64, 16, 4, 4, 128), (64, 16, 4, 2, 104),
    (128, 64, 8, 2, 128), (128, 64, 8, 3, 128),
]  # fmt: skip
QUERIES = [
    (64, 64, 4, 2, 255),
    (64, 32, 4, 2, 255),
    (64, 32, 4, 3, 255),
    (64, 16, 4, 2, 255),
    (64, 32, 4, 3, 168),
    (64, 64, 4, 2, 168),
]
KEYS = [(64, 64, 4, 2, 255), (32, 64, 4, 3, 255), (64, 32, 4, 3, 255), (32, 128, 8, 3, 255), (64, 64, 8, 2, 128)]


# (programs, channels a warp, rows in flight)
NORM_BACKWARD = [
    (264, 512, 1), (528, 512, 1), (1056, 512, 1), (264, 256, 1), (528, 256, 1), (264, 512, 2), (528, 512, 2), (264, 512, 3), (528, 512, 3), (528, 1024, 3),
]  # fmt: skip
DECODE = [(64, 4, 3), (32, 4, 3), (32, 2, 3), (16, 2, 2), (64, 8, 2)]  # slots, warps, load stages


def projections(count: int, batch: int, length: int) -> tuple[torch.Tensor, ...]:
    """`count` tensors (B, T, 16, 128) bf16, slices of one fused projection as in the model."""
    return torch.randn(batch, length, count, 16, 128, device="cuda", dtype=torch.bfloat16).unbind(2)


def with_table(module: Any, name: str, value: Any, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        kept = getattr(module, name)
        setattr(module, name, value)
        try:
            return run()
        finally:
            setattr(module, name, kept)

    return call


def scan_variants(batch: int, length: int, small: bool) -> Iterator[Variant]:
    """The tiles of a shape; `small` compiles the same code on four blocks or so."""
    shape, length = (batch, length), 1024 if small else length
    k, v, g = projections(3, batch, length)
    dk, dv = projections(2, batch, length)
    cos, sin = rotary_tables(torch.arange(length, device="cuda"), 128)
    oracle = functools.cache(lambda: scan_oracle((k, v, g), (dk, dv), cos, sin))
    label, (usual, _) = f"{batch}x{length}", scan._tiles(k)

    def forward() -> tuple[torch.Tensor, ...]:
        return scan.scan_forward(k, v, g, cos, sin, None, None, torch.bfloat16, False)[:2]

    for tile in SCAN_FORWARD[shape]:
        run = with_table(scan, "_tiles", lambda k, tile=tile: (tile, tile), forward)
        yield Variant(f"scan forward {label} {tuple(tile)}", run, lambda found: scan_error(found, oracle()[:2], 4e-3))
    for tile in SCAN_BACKWARD[shape]:
        states: list[torch.Tensor] = []  # in front of this tile's blocks

        def backward(states: list[torch.Tensor] = states) -> tuple[torch.Tensor, ...]:
            if not states:
                states.append(scan.scan_forward(k, v, g, cos, sin, None, None, torch.bfloat16, True)[3])
            return scan.scan_backward(k, v, g, cos, sin, None, states[0], dk, dv, None)[:3]

        run = with_table(scan, "_tiles", lambda k, tile=tile: (usual, tile), backward)
        yield Variant(f"scan backward {label} {tuple(tile)}", run, lambda found: scan_error(found, oracle()[2:], 1e-2))


def scan_oracle(
    inputs: tuple[torch.Tensor, ...], douts: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients in float64, of the first and the last head."""
    wide = [x[:, :, ::15].double().requires_grad_() for x in inputs]
    outputs = gated_scan(*wide, cos, sin, backend="reference")[:2]
    gradients = torch.autograd.grad(outputs, wide, [d[:, :, ::15].double() for d in douts])
    return (*(x.detach() for x in outputs), *gradients)


def scan_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> float:
    return max(relative_error(x[:, :, ::15], y) for x, y in zip(found, expected, strict=True)) / tolerance


def attention_variants(batch: int, length: int, pattern: tuple[int, int, int], backward: bool) -> Iterator[Variant]:
    q, k, v, dout = (x.contiguous() for x in projections(4, batch, length))
    label = f"{batch}x{length} {pattern}"
    for tile in ATTENTION_FORWARD:
        run = with_table(
            attention,
            "FORWARD_TILES",
            ((1 << 30, tile),),
            lambda: attention.attention_forward(q, k, v, None, None, pattern, 0.088),
        )
        yield Variant(f"attention forward {label} {tile}", run)
    if not backward:
        return
    out, lse = attention.attention_forward(q, k, v, None, None, pattern, 0.088)

    def run_backward() -> object:
        return attention.attention_backward(q, k, v, None, None, out, lse, dout, None, pattern, 0.088)

    for tile in QUERIES:
        run = with_table(attention, "QUERY_TILES", ((1 << 30, tile),), run_backward)
        yield Variant(f"attention backward queries {label} {tile}", run)
    for tile in KEYS:
        yield Variant(f"attention backward keys {label} {tile}", with_table(attention, "KEY_TILE", tile, run_backward))


def norm_variants(rows: int) -> Iterator[Variant]:
    """The backward of a residual sum's norm at 2048 channels, the residual in fp32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        total, dtotal = torch.randn(2, rows, 2048, device="cuda").to(dtype)
        dy = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
        weight, rstd = torch.ones(2048, device="cuda", dtype=torch.bfloat16), torch.ones(rows, device="cuda")

        def backward(total=total, dtotal=dtotal, dy=dy, weight=weight, rstd=rstd) -> object:
            return norm.norm_backward(total, weight, rstd, dy, dtotal, torch.bfloat16)

        x, dy_wide = total.double(), dy.double()  # rstd and weight are ones: y = x
        expected = dy_wide - x * (dy_wide * x).mean(-1, keepdim=True) + dtotal.double(), (dy_wide * x).sum(0)

        def error(found: Any, expected: tuple[torch.Tensor, ...] = expected) -> float:
            return max(relative_error(y, oracle) for y, oracle in zip((found[0], found[2]), expected, strict=True)) / 1e-2

        for setting in NORM_BACKWARD:
            yield Variant(f"norm backward {rows} {dtype} {setting}", with_table(norm, "BACKWARD", setting, backward), error)


def decode_variants() -> Iterator[Variant]:
    """Whole steps of the 1.5B model at 64 sequences of 4096 tokens; a graph is captured on the first run of a variant."""
    for pattern in ((64, 0, 0), (16, 256, 0)):
        for tile in DECODE:
            graphs: list[Callable[[], object]] = []

            def replay(graphs: list[Callable[[], object]] = graphs, pattern: tuple[int, int, int] = pattern) -> object:
                if not graphs:
                    graphs.append(decode_graph(24, 2048, 32000, 64, 4096, pattern))
                return graphs[0]()

            yield Variant(f"decode step 64x4096 {pattern} {tile}", with_table(decode, "TILES", ((1 << 30, tile),), replay))


def all_variants(group: str, small: bool) -> Iterator[Variant]:
    """Every variant of a group at its real shapes, or once at a small shape with the same compiled code."""
    batch, length = (2, 1024) if small else (8, 4096)
    if group == "decode":
        yield from decode_variants()
        return
    if group == "norm":
        yield from norm_variants(4096 if small else 32768)
        return
    if group == "scan":
        for shape in SCAN_FORWARD:
            yield from scan_variants(*shape, small)
        return
    yield from attention_variants(batch, length, (64, 0, 0), backward=True)
    yield from attention_variants(batch, length, (16, 256, 4), backward=True)
    if not small:
        yield from attention_variants(batch, length, (16, 0, 0), backward=True)
        yield from attention_variants(1, 131072, (16, 0, 0), backward=False)
        yield from attention_variants(1, 131072, (64, 0, 0), backward=False)


def compile_share(group: str, share: str) -> None:
    index, shares = (int(part) for part in share.split("/"))
    for number, variant in enumerate(all_variants(group, small=True)):
        if number % shares == index:
            failure, error = attempt(variant)
            print(f"{variant.name}: {failure or f'{error:.3f} of the tolerance'}", flush=True)
    torch.cuda.synchronize()


def attempt(variant: Variant) -> tuple[str | None, float]:
    """Runs it: the reason if this GPU cannot (too much shared memory, say) or the result is wrong, and its error."""
    try:
        found = variant.run()
        error = 0.0 if variant.error is None else variant.error(found)
    except Exception as failure:
        return f"{type(failure).__name__}: {str(failure)[:100]}", float("nan")
    return (None if error <= 1 else f"WRONG, {error:.2f} times its tolerance"), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=("scan", "attention", "decode", "norm"))
    parser.add_argument("--compile", metavar="I/N", help="only compile this share of the variants")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_share(arguments.group, arguments.compile)
        return
    ceilings = measure_ceilings()
    print(f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, bf16 product {ceilings.flop_per_s / 1e12:.0f} TFLOP/s")
    began = time.time()
    for variant in all_variants(arguments.group, small=False):
        failure, error = attempt(variant)
        result = failure or f"{time_cuda(variant.run, budget_ms=30.0).median:.3f} ms, {error:.3f} of the tolerance"
        print(f"{time.time() - began:6.1f} {variant.name}: {result}", flush=True)


if __name__ == "__main__":
    main()

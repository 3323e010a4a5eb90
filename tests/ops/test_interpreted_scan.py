from __future__ import annotations

from tests.ops.oracle import run_interpreted


def test_kernels_of_scan_match_their_oracles_in_the_interpreter():
    run_interpreted("scan")

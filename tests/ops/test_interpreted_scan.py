from __future__ import annotations

import pytest

from tests.ops.oracle import run_interpreted


@pytest.mark.slow
def test_kernels_of_scan_match_their_oracles_in_the_interpreter():
    run_interpreted("scan")

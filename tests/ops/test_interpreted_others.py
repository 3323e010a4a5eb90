from __future__ import annotations

import pytest

from tests.ops.oracle import run_interpreted


@pytest.mark.slow
def test_kernels_of_all_other_operations_match_their_oracles_in_the_interpreter():
    run_interpreted("decode", "cross_entropy", "norm", "elementwise")

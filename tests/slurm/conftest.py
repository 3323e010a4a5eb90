from __future__ import annotations

import cluster as slurm
import pytest


@pytest.fixture(scope="session")
def cluster():
    """Four virtual nodes of a real Slurm, started once; skipped with the reason where there can be none."""
    if reason := slurm.reason_against():
        pytest.skip(f"no Slurm here: {reason}")
    with slurm.running(nodes=4) as running:
        yield running

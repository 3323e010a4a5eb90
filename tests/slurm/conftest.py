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


@pytest.fixture(scope="module", autouse=True)
def no_ranks_in_the_environment():
    """A job inherits the environment of whoever submits it, and this process may have started a mesh of one rank before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield

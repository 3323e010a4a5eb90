from __future__ import annotations

import cluster as slurm
import pytest
import standin


@pytest.fixture(scope="session")
def cluster():
    """The virtual nodes of a real Slurm, started once; skipped with the reason where there can be none."""
    if reason := slurm.reason_against():
        pytest.skip(f"no Slurm here: {reason}")
    with slurm.running() as running:
        yield running


@pytest.fixture(scope="session")
def jobs(cluster, tmp_path_factory) -> dict[str, standin.Submitted]:
    """The jobs of the stand-in, by what happens to them."""
    return standin.submit_all(cluster, tmp_path_factory.mktemp("stand-in"))

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def mesh():
    """This process as a mesh of one CPU rank; DeepSpeed is started once for all tests of a session."""
    import torch

    from megarat.mesh import start

    torch.set_num_threads(1)
    return start("cpu")

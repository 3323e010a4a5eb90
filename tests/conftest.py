from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


STARTED = time.monotonic()
SLOW_TEST_MINUTES = float(os.environ.get("SLOW_TEST_MINUTES", "inf"))


def pytest_collection_modifyitems(items):
    """Jobs on Slurm come first: they wait for much, and the other tests have a processor to run on meanwhile; then files with slow tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: ("slurm" not in item.path.parts, item.path not in slow))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """So that a run has an end on a machine that others keep busy: slow tests are left out, and said to be, once that time is over."""
    if item.get_closest_marker("slow") and time.monotonic() - STARTED > 60 * SLOW_TEST_MINUTES:
        pytest.skip(f"not begun within the first {SLOW_TEST_MINUTES:g} minutes (SLOW_TEST_MINUTES): the machine is too busy")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tests are small: one thread each is fastest, and sums come out in the same order everywhere."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mesh(one_thread):
    """This process as a mesh of one CPU rank; DeepSpeed is started once for all tests of a session."""
    import tiny_run

    from megarat.engine import Engine
    from megarat.mesh import start

    mesh = start("cpu")
    settings = tiny_run.config()
    Engine(tiny_run.model(settings), settings, mesh)  # imports all that DeepSpeed needs
    gc.freeze()  # its BF16_Optimizer collects garbage six times an engine: let it not search the imported modules
    return mesh


@pytest.fixture(scope="session")
def golden_pth() -> Path:
    """A checkpoint written by the published code: 2 layers of width 256, 2 heads, vocabulary 512."""
    return GOLDEN / "upstream-tiny.pth"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the published code printed for that checkpoint: token ids, logits by pattern, and six batches of joint training."""
    with np.load(GOLDEN / "upstream-tiny.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def published(golden_pth):
    """That checkpoint as a fresh fp32 model."""
    from megarat.checkpoint.upstream import read_upstream
    from megarat.infer.load import fill_model
    from megarat.model.lm import RATPlusLM

    config, weights, _ = read_upstream(golden_pth)
    model = RATPlusLM(config)
    fill_model(model, weights, str(golden_pth))
    return model

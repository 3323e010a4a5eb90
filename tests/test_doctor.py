"""What `megarat doctor` says of the kernels, on GPUs that are not there."""

from __future__ import annotations

import importlib

import pytest
import torch

from megarat import doctor
from megarat.ops import dispatch


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of a given compute capability, on which torch takes a given dense attention."""

    def pretend(capability: tuple[int, int], backend: str = "cuDNN") -> None:
        monkeypatch.delenv("MEGARAT_OPS", raising=False)
        monkeypatch.setattr(dispatch, "_missing", None)
        monkeypatch.setattr(dispatch, "_gpu_reasons", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        module = importlib.import_module("megarat.ops.dilated_attention")  # `megarat.ops` has a function of that name
        monkeypatch.setattr(module, "dense_backend", lambda *arguments: backend)

    return pretend


def test_a_served_gpu_is_told_what_falls_back(gpu):
    gpu((9, 0))
    ops = doctor._kernels()
    assert ops.status == doctor.OK
    assert "timed on an H200;" in ops.found
    assert "float64" in ops.found


def test_an_old_gpu_is_named_with_its_capability(gpu):
    gpu((7, 5))
    ops = doctor._kernels()
    assert ops.status == doctor.NOTE
    assert "7.5" in ops.found


@pytest.mark.parametrize(("backend", "status"), [("cuDNN", doctor.OK), ("Flash", doctor.OK), ("math", doctor.NOTE)])
def test_the_dense_attention_torch_chose_is_named_and_a_slow_one_marked(gpu, backend, status):
    gpu((9, 0), backend)
    dense = doctor._dense_attention()
    assert (dense.status, dense.found.split(",")[0]) == (status, backend)

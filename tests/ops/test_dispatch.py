from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from megarat.errors import UserError
from megarat.ops import dispatch


class OnGpu:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("MEGARAT_OPS", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_missing", None)
    monkeypatch.setattr(dispatch, "_gpu_reasons", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_cpu_tensors_take_the_reference_and_gpu_tensors_the_kernels():
    assert dispatch.choose_backend("op", None, torch.ones(1), None) == "reference"
    assert dispatch.choose_backend("op", None, OnGpu(), None) == "triton"


def test_the_switch_forces_the_reference(monkeypatch):
    monkeypatch.setenv("MEGARAT_OPS", "reference")
    assert dispatch.choose_backend("op", None, OnGpu(), None) == "reference"
    monkeypatch.setenv("MEGARAT_OPS", "fast")
    with pytest.raises(UserError, match="MEGARAT_OPS='fast'"):
        dispatch.choose_backend("op", None, OnGpu(), None)


def test_the_switch_forces_the_reference_of_named_operations(monkeypatch):
    monkeypatch.setenv("MEGARAT_OPS", "reference:parts,rms_norm")
    chosen = {op: dispatch.choose_backend(op, None, OnGpu(), None) for op in dispatch.OPERATIONS}
    assert {op for op, backend in chosen.items() if backend == "reference"} == {"parts", "rms_norm"}
    for wrong in ("reference:norm", "reference:", "auto:parts", "reference:parts rms_norm"):
        monkeypatch.setenv("MEGARAT_OPS", wrong)
        with pytest.raises(UserError, match="write 'auto', 'reference', or 'reference:' and some of accumulate_, "):
            dispatch.choose_backend("parts", None, OnGpu(), None)


def test_every_operation_can_be_named():
    """The names are those that the operations ask with."""
    folder = Path(dispatch.__file__).parent
    asked = {
        name for file in folder.glob("*.py") for name in re.findall(r'choose_backend\("(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert asked == set(dispatch.OPERATIONS)


def test_an_unsupported_call_falls_back_with_one_warning_per_reason():
    with pytest.warns(RuntimeWarning, match="op runs its slow torch reference: odd heads"):
        assert dispatch.choose_backend("op", None, OnGpu(), "odd heads") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_backend("op", None, OnGpu(), "odd heads") == "reference"


def test_an_explicit_backend_is_obeyed_or_refused():
    assert dispatch.choose_backend("op", "reference", OnGpu(), None) == "reference"
    with pytest.raises(ValueError, match="odd heads"):
        dispatch.choose_backend("op", "triton", OnGpu(), "odd heads")
    with pytest.raises(ValueError, match="'cuda'"):
        dispatch.choose_backend("op", "cuda", OnGpu(), None)


def test_an_older_gpu_runs_the_reference_and_says_which_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5, the kernels need 8\.0"):
        assert dispatch.choose_backend("op", None, OnGpu(), None) == "reference"


def test_tiles_count_as_timed_on_the_processor_of_the_tables_alone(monkeypatch):
    assert dispatch.tiles_are_timed(OnGpu.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert not dispatch.tiles_are_timed(OnGpu.device)


def test_a_gradient_that_does_not_exist_is_refused():
    asked = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="op has no backward"):
        dispatch.refuse_gradients("op", None, asked)
    dispatch.refuse_gradients("op", asked.detach())
    with torch.no_grad():
        dispatch.refuse_gradients("op", asked)

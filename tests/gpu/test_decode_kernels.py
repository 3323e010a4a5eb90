"""The decode step's kernels on this machine's GPU, in fp32 and bf16, at shapes a training run has."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

from tests.ops.decode_cases import *  # noqa: E402, F403

"""Two ranks over NCCL, one of which fails while the other waits for it in a collective: both end, and soon."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

PROGRAM = """
import sys, torch
from megarat import cli, mesh
here = mesh.start("cuda")
x = torch.ones((), device=here.device)
torch.distributed.all_reduce(x, group=here.group(("data",)))
if here.rank == {failing}:
    {end}
torch.distributed.all_reduce(x, group=here.group(("data",)))
torch.cuda.synchronize()
"""
ENDS = {"told": "sys.exit(cli.main(['checkpoint', 'show', '/nowhere']))", "raised": "raise RuntimeError('/nowhere is lost')"}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_rank_that_fails_ends_those_that_wait_for_it(tmp_path, failing, end):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(failing=failing, end=end))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    # torchrun asks the other rank to end, and kills it after 30 s: where the failing one hangs, neither is done
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1 and "/nowhere" in done.stderr
    assert f"rank      : {failing} " in done.stderr.split("Root Cause")[1]

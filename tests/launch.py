"""What starts processes in tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# pip puts MPI's launcher beside Python, which is not on the path where the tests are called by that Python's full name
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

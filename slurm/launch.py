"""``launch.py MODULE ARGUMENTS…``: runs a module of the tree this file lies in.

A job must run the code that was copied for it: not what has been installed since, and not what lies in the working folder, which
``python -m`` would take first.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

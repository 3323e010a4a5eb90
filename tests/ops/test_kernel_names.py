"""Profilers show a kernel by its function's name alone."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "megarat" / "ops" / "kernels"


def test_no_two_kernels_share_a_name():
    """What is launched ends in `_kernel`; what kernels call does not, and may be named alike."""
    functions = [node for path in KERNELS.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = Counter(node.name for node in functions if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"))
    launched = {node.value.id for node in functions if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)}
    assert {name for name in launched if name.endswith("_kernel")} == set(names)
    assert [name for name, count in names.items() if count > 1] == []
    assert "_kernel" not in names
    assert len(names) > 10

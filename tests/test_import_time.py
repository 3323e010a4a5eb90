"""Importing megarat and asking for help stay light: nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch", "numpy", "deepspeed", "triton", "webdataset", "tensorboard", "sentencepiece", "tokenizers", "matplotlib", "pyarrow", "mpi4py",
}  # fmt: skip


def modules_after(statements: str) -> set[str]:
    """Top-level modules that a fresh Python holds after ``statements``."""
    code = f"{statements}\nimport sys\nprint('\\nMODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def help_of(*arguments: str) -> str:
    return f"""
from megarat.cli import main
try:
    main({[*arguments, "--help"]!r})
except SystemExit as end:
    assert end.code == 0
"""


@pytest.mark.parametrize(
    "statements",
    [
        "import megarat; megarat.__version__; dir(megarat)",
        "import megarat.errors, megarat.config, megarat.cli",
        "from megarat import Pattern; Pattern.parse('D=16,W=256,I=4')",
        help_of(),
        help_of("pretrain"),
        help_of("eval"),
        help_of("checkpoint", "import"),
    ],
    ids=["import", "config and cli", "pattern", "help", "pretrain help", "eval help", "import help"],
)
def test_nothing_heavy_is_imported(statements):
    loaded = modules_after(statements)
    assert "megarat" in loaded
    assert not loaded & HEAVY


def test_load_and_pattern_are_found_on_first_use_and_nothing_else_is():
    loaded = modules_after("import megarat; assert callable(megarat.load)")
    assert "torch" in loaded and not loaded & {"deepspeed", "tensorboard", "webdataset", "matplotlib"}
    import megarat

    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        _ = megarat.train_everything

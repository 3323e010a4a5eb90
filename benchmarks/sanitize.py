"""The kernels under NVIDIA's compute-sanitizer: `python -m benchmarks.sanitize [--tools memcheck racecheck synccheck]`.

A selection of the GPU tests, with short shapes, that launches every kernel in its main forms. memcheck sees accesses outside of
allocations (torch's caching, which would hide them, is off), racecheck hazards in shared memory, synccheck barriers that not all threads
reach. The verdicts, and each report once, go to benchmarks/sanitizer.md, above what is written there by hand.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.measure import ROOT, environment

REPORT = Path(__file__).parent / "sanitizer.md"
BY_HAND = "<!-- from here on by hand -->"
TESTS = {
    "test_scan_kernels.py": (
        "::test_gated_scan_and_all_its_gradients_match_float64[(2, 13, 2, 16, True, True, True, 'mixed')-True-torch.bfloat16]",
        "::test_gated_scan_and_all_its_gradients_match_float64[(2, 777, 1, 128, True, False, True, 'open')-False-torch.bfloat16]",
        "::test_blocks_that_take_their_state_from_further_in_front_find_the_same",
        "::test_two_halves_with_carried_state_equal_one_scan",
    ),
    "test_attention_kernels.py": (
        "::test_dilated_attention_and_all_its_gradients_match_float64[(2, 37, 2, 16, (4, 0, 0), True, False)-torch.bfloat16]",
        "::test_dilated_attention_and_all_its_gradients_match_float64[(1, 75, 1, 32, (5, 20, 7), True, False)-torch.bfloat16]",
        "::test_dilated_attention_and_all_its_gradients_match_float64[(2, 45, 1, 16, (5, 20, 7), False, True)-torch.bfloat16]",
    ),
    "test_decode_kernels.py": (
        "::test_decoding_step_by_step_equals_the_full_forward_for_rows_of_different_lengths[(3, 4, 2)-3]",
    ),
    "test_cross_entropy_kernels.py": (
        "::test_linear_cross_entropy_and_its_gradients_match_float64[(37, 32, 4500)-whole-torch.bfloat16]",
        "::test_linear_cross_entropy_and_its_gradients_match_float64[(37, 32, 4500)-split-torch.bfloat16]",
    ),
    "test_norm_kernels.py": (
        "::test_norm_behind_a_residual_sum_and_all_its_gradients_match_float64[(2, 5, 96)-torch.bfloat16-both]",
        "::test_norm_and_its_gradients_match_float64",
    ),
    "test_elementwise_kernels.py": ("",),
    "test_fp8.py": ("::test_the_kernel_rounds_as_torch_does",),
}


def selection() -> list[str]:
    return [f"tests/gpu/{file}{test}" for file, tests in TESTS.items() for test in tests]


def check(tool: str, tests: list[str], seconds: float) -> tuple[str, str]:
    """Runs the tests under a tool: what it found in words, and all its output."""
    switches = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **switches}, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as cut:
        return f"not finished after {seconds:.0f} s", _text(cut.stdout) + _text(cut.stderr)
    output = done.stdout + done.stderr
    passed, found = re.search(r"(\d+) passed", output), re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    tests_said = f"{passed[1]} tests passed" if passed and done.returncode in (0, 9) else f"tests ended with {done.returncode}"
    return f"{tests_said}, {found[1] if found else 'no summary'}, {time.monotonic() - began:.0f} s", output


def reports(output: str) -> list[str]:
    """Each report of a tool once, with how often it came; the number of hazards in it left out."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    blocks = [block.splitlines() for block in "\n".join(lines).split("\n\n")]
    said = [" ".join(re.sub(r" \[\d+ hazards?\]", "", line) for line in block) for block in blocks if block]
    counts = Counter(line for line in said if line.startswith(("Error", "Warning", "Invalid", "Barrier")))
    return [f"  - {number} times: {line}" for line, number in counts.items()]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck", "synccheck"])
    parser.add_argument("--seconds", type=float, default=1800.0, help="the most that a tool may take")
    parser.add_argument("--report", type=Path, default=REPORT)
    arguments = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer, a part of the CUDA toolkit, is not on the PATH")
    by_hand = BY_HAND + (REPORT.read_text().partition(BY_HAND)[2].rstrip("\n") if REPORT.exists() else "")
    text = [
        "# The kernels under compute-sanitizer", "",
        "Down to the mark written by `python -m benchmarks.sanitize`; do not edit. Tests that were run:", "",
        *(f"- `{test}`" for test in selection()), "",
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}, "
        + ", ".join(f"{key} {value}" for key, value in environment().items()) + ":", "",
    ]  # fmt: skip
    for tool in arguments.tools:
        verdict, output = check(tool, selection(), arguments.seconds)
        print(output[-3000:], f"{tool}: {verdict}", sep="\n", flush=True)
        text += [f"- {tool}: {verdict}", *reports(output)]
        arguments.report.write_text("\n".join([*text, "", by_hand]) + "\n")


if __name__ == "__main__":
    main()

"""The page and the picture of an evaluation."""

from __future__ import annotations

import pytest

from megarat.errors import UserError
from megarat.eval.report import panels, write_report
from megarat.eval.runner import table


def results(**tasks) -> dict:
    return {
        "schema": 1,
        "megarat": "0.1.0",
        "checkpoint": {"path": "runs/a", "pair": 7, "tokens": 12345, "content": "abc123"},
        "model": {"layers": 2, "hidden": 16, "heads": 2},
        "device": "cpu",
        "dtype": "float32",
        "sequence_length": 64,
        "tasks": tasks,
    }


PPL = [
    {"pattern": pattern, "loss": loss, "perplexity": 9.0, "tokens": 10, "cache_bytes_per_sequence": size, "seconds": 1.0}
    for pattern, loss, size in (("dense", 3.25, 4 << 20), ("D=16,W=0,I=0", 3.5, 1 << 20))
]
NEEDLE = [
    {
        "pattern": "dense",
        "task": task,
        "ruler": ruler,
        "exact": 0.0,
        "samples": 4,
        "prompt_tokens": 50,
        "cache_bytes_per_sequence": size,
    }
    for task, ruler, size in (("single_1", 0.5, 100), ("multivalue", 0.75, 120))
]


def test_the_page_holds_identity_tables_and_picture(tmp_path):
    found = results(ppl=PPL, needle=NEEDLE)
    page = write_report(found, tmp_path / "new").read_text(encoding="utf-8")
    assert page.startswith("# runs/a\n") and "pair 7, 12,345 tokens; content `abc123`" in page
    assert table(found) in page and "(report.png)" in page
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_is_loss_and_mean_accuracy_against_cache():
    harness = [
        {"pattern": "dense", "task": task, "metrics": metrics, "cache_bytes_per_sequence": 7}
        for task, metrics in (("piqa", {"acc": 0.5}), ("sciq", {"acc": 0.75, "acc_norm": 0.9}), ("text", {"perplexity": 9.0}))
    ]
    speed = [{"pattern": "D=4", "prefill_tokens_per_s": 90.0, "decode_tokens_per_s": 30.0, "cache_bytes_per_sequence": 8}]
    assert panels(results(ppl=PPL, needle=NEEDLE, harness=harness) | {"speed": speed}) == {
        "loss (nats)": [("dense", 4 << 20, 3.25), ("D=16,W=0,I=0", 1 << 20, 3.5)],
        "needle accuracy (%)": [("dense", 120, 62.5)],
        "harness, mean acc (%)": [("dense", 7, 62.5)],
        "prefill (tokens/s)": [("D=4", 8, 90.0)],
        "decode (tokens/s)": [("D=4", 8, 30.0)],
    }


def test_layers_that_differ_stay_in_their_cell():
    rows = [row | {"pattern": "dense | D=16,W=0,I=0"} for row in PPL[:1]]
    [line] = [line for line in table(results(ppl=rows)).splitlines() if "dense" in line]
    assert line.startswith("| dense \\| D=16,W=0,I=0 | 3.2500 |")


def test_without_caches_to_compare_there_is_no_picture(tmp_path):
    row = {
        "pattern": "dense",
        "task": "text",
        "metrics": {"perplexity": 9.0},
        "stderr": {},
        "samples": 4,
        "version": 1.0,
        "seconds": 1.0,
    }
    assert "report.png" not in write_report(results(harness=[row]), tmp_path).read_text()
    assert not (tmp_path / "report.png").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: cannot write .*report.md"):
        write_report(results(ppl=PPL), tmp_path / "file")

"""``report.py ADAPT_DIR``: one Markdown table of what the adaptations below a folder have reached, into ADAPT_DIR/report.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Write the report; 1 when not one pattern has a result."""
    base = Path(sys.argv[1])
    wanted = sorted(folder for folder in base.iterdir() if folder.is_dir() and folder.name != "slurm")
    results = {folder: read_results(folder / "eval/results.json") for folder in wanted}
    text = report(base, results)
    (base / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if any(results.values()) else 1


def read_results(path: Path) -> dict[str, Any] | None:
    """What ``megarat eval`` wrote, or None when it has not."""
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return results


def report(base: Path, results: dict[Path, dict[str, Any] | None]) -> str:
    """Perplexity a pattern, and a line for each run that has no result."""
    lines = [
        f"# {base.name}",
        "",
        "| pattern | pairs | loss (nats) | perplexity | KV cache of a sequence |",
        "|---|---:|---:|---:|---:|",
    ]
    missing = []
    for folder, found in results.items():
        rows = (found or {}).get("tasks", {}).get("ppl", [])
        if not rows:
            missing.append(f"- `{folder.name}`: no results; see `megarat status {folder}`")
        for row in rows:
            cache = f"{row['cache_bytes_per_sequence'] / 1024:,.1f} KiB"
            lines.append(
                f"| {row['pattern']} | {found['checkpoint']['pair']} | {row['loss']:.4f} | {row['perplexity']:.2f} | {cache} |"
            )
    return "\n".join([*lines, *(["", *missing] if missing else [])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

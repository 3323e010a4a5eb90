"""What benchmarks/sanitizer.md keeps of a tool's output."""

from __future__ import annotations

from benchmarks.sanitize import reports

OUTPUT = """========= COMPUTE-SANITIZER
..
=========
========= Error: Race reported between Write access at _kernel+0x10 in a.py:1
=========     and Write access at _kernel+0x10 in a.py:1 [72 hazards]
=========
========= Error: Race reported between Write access at _kernel+0x10 in a.py:1
=========     and Write access at _kernel+0x10 in a.py:1 [8 hazards]
=========
========= Error: Race reported between Read access at _kernel+0x20 in a.py:2
=========     and Write access at _kernel+0x30 in a.py:3 [1 hazard]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""


def test_each_report_is_kept_once_with_how_often_it_came():
    place = "Error: Race reported between Write access at _kernel+0x10 in a.py:1 and Write access at _kernel+0x10 in a.py:1"
    other = "Error: Race reported between Read access at _kernel+0x20 in a.py:2 and Write access at _kernel+0x30 in a.py:3"
    assert reports(OUTPUT) == [f"  - 2 times: {place}", f"  - 1 times: {other}"]
    assert reports("========= COMPUTE-SANITIZER\n...\n========= ERROR SUMMARY: 0 errors\n") == []

"""Signs of life: a file that grows no older, and an earlier start that ends when it sees a later one in it."""

from __future__ import annotations

import os
import subprocess
import sys

from megarat import heartbeat


def test_a_sign_of_life_touches_the_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "heartbeat"
    file.write_text("7.0\n")
    os.utime(file, (1, 1))
    monkeypatch.setattr(heartbeat, "_next", 0.0)
    heartbeat.beat()  # nobody watches
    assert file.stat().st_mtime == 1
    monkeypatch.setenv("MEGARAT_HEARTBEAT", str(file))
    monkeypatch.setenv("MEGARAT_START", "7.0")
    heartbeat.beat()
    assert file.stat().st_mtime > 1 and file.read_text() == "7.0\n"
    os.utime(file, (1, 1))
    heartbeat.beat()  # not more than one a second
    assert file.stat().st_mtime == 1
    file.unlink()
    monkeypatch.setattr(heartbeat, "_next", 0.0)
    heartbeat.beat()  # a lost file ends nothing


def test_an_earlier_start_ends_when_a_later_one_has_begun(tmp_path):
    file = tmp_path / "heartbeat"
    file.write_text("7.1\n")
    code = "from megarat.heartbeat import beat\ntry: beat()\nfinally: print('on the way out')"
    environment = {**os.environ, "MEGARAT_HEARTBEAT": str(file), "MEGARAT_START": "7.0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "start 7.1 of this job has taken over; start 7.0 ends here" in done.stderr

"""Requests to stop, the lock of a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from megarat.errors import UserError
from megarat.train.guard import StopRequest, run_lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_request_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest().listening() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_wall_clock_limit_is_a_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest(wall_clock_minutes=2)
    now[0] += 119
    assert stop.reason is None
    now[0] += 1
    assert stop.reason == "train.wall_clock_minutes = 2 is over"


def _hold_lock(folder, ready, release):
    with run_lock(folder):
        ready.set()
        release.wait(20)


def test_a_folder_in_use_is_refused_and_a_dead_holder_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold_lock, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "), run_lock(tmp_path):
        pass
    holder.kill()
    holder.join()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid  # stale, as after a crash
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def held_once_then_refused(run_dir, monkeypatch, number):
    """This process has held the lock, so the file names it; from now on the system refuses with an error of that number."""
    with run_lock(run_dir):
        pass

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSYS, "Function not implemented"), (errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_told_and_nobody_is_blamed(tmp_path, monkeypatch, number, told):
    """Lustre is often mounted without, and NFS may have lost its lock daemon; the file still names who held the lock before."""
    held_once_then_refused(tmp_path, monkeypatch, number)
    with pytest.raises(UserError, match=rf"cannot lock .*lock: {told}"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_either_word_of_the_system_for_a_lock_that_is_held_names_the_holder(tmp_path, monkeypatch, number):
    held_once_then_refused(tmp_path, monkeypatch, number)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "), run_lock(tmp_path):
        pass

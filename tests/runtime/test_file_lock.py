"""One process at a time, also where the file system has no locks."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from filelock import Timeout

from utils.runtime.file_lock import NO_LOCKS, acquire_lock

fcntl = pytest.importorskip("fcntl")
KILLED = """
import fcntl, os, signal, sys
from pathlib import Path
from utils.runtime.file_lock import acquire_lock
def flock(*args):
    raise OSError(int(sys.argv[2]), "no locks")
if sys.argv[2] != "0":
    fcntl.flock = flock
acquire_lock(Path(sys.argv[1]), print)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=[0, *NO_LOCKS], ids=lambda number: errno.errorcode.get(number, "locks"))
def error_number(request, monkeypatch):
    """What the file system answers to who asks for a lock; 0 gives the lock."""

    def flock(*args):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_a_lock_is_held_by_one_and_then_by_the_next(error_number, tmp_path):
    path, lines = tmp_path / "lock", []
    first = acquire_lock(path, lines.append)
    with pytest.raises(Timeout, match="lock"):
        acquire_lock(path, lines.append)
    first.release()
    acquire_lock(path, lines.append).release()
    assert len(lines) == (3 if error_number else 0)
    assert all("the file system has no locks" in line for line in lines)


def test_the_lock_of_a_process_that_was_killed_is_free(error_number, tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "lock", str(error_number)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    acquire_lock(tmp_path / "lock", lambda line: None).release()


def test_a_folder_that_cannot_be_written_is_no_matter_of_locks(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        acquire_lock(tmp_path / "file" / "lock", pytest.fail)

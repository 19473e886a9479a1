"""How long the hub is waited for."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import errors, get_session

from tests.helpers.fake_hub import serve_hub
from utils.runtime import stall_monitor
from utils.runtime.stall_monitor import call_with_timeout

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(200))
END_IN_THE_MIDST = """
import io, time
from concurrent.futures import Future
import pyarrow
from pyarrow import dataset, parquet
from utils.runtime import stall_monitor, threads

class SlowFile(io.BytesIO):
    def close(self):
        for _ in range(500):
            time.sleep(0.001)
        super().close()

class EarlyFuture(Future):
    def set_result(self, result):
        super().set_result(result)
        time.sleep(0.1)

def read_batches():
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"] * 100}), file)
    fragment = dataset.ParquetFileFormat().make_fragment(SlowFile(file.getvalue()))
    # Without threads of Arrow's own, which would let go of the file at a moment of their own.
    yield from fragment.to_batches(batch_size=10, use_threads=False)

def read_some():
    batches = read_batches()
    return stall_monitor.call_with_timeout(lambda: len(next(batches)))

threads.Future = EarlyFuture
print(read_some())
time.sleep(0.3)
"""
"""Ends while what it has read from is being freed. `EarlyFuture` has its result well before the
thread that computes it has let go of the file, which takes long to close."""


@pytest.fixture
def get(monkeypatch):
    """Gets a file from a hub that is given up after a second of silence, as its clients do."""
    monkeypatch.setattr(stall_monitor, "PATIENCE_S", 0.5)
    monkeypatch.setattr(stall_monitor, "GRACE_S", 0.5)
    names = "whole", "CRAWLS", "STALLS"
    with serve_hub({f"a/b/{name}": CONTENT for name in names}) as hub:

        def get(name):
            url = f"{hub.endpoint}/a/b/resolve/main/{name}"
            return get_session().get(url, timeout=None).content

        yield get


@pytest.mark.parametrize("name", ["whole", "CRAWLS"])
def test_a_hub_that_sends_something_is_waited_for(get, name):
    assert call_with_timeout(partial(get, name)) == CONTENT


def test_the_client_of_a_silent_hub_ends_by_itself(get):
    with pytest.raises(errors.HTTPError):
        call_with_timeout(partial(get, "STALLS"))


def test_what_sends_the_same_again_and_again_is_given_up(get):
    def get_for_ever():
        while True:
            get("whole")

    with pytest.raises(OSError, match="nothing for"):
        call_with_timeout(get_for_ever)


def test_what_no_timeout_of_the_client_ends_is_given_up(get):
    is_over = threading.Event()
    with pytest.raises(OSError, match="nothing for"):
        call_with_timeout(is_over.wait)
    is_over.set()


def test_a_process_that_ends_amid_a_file_does_not_abort():
    pytest.importorskip("pyarrow")
    command = [sys.executable, "-c", END_IN_THE_MIDST]
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr

"""The progress bar shows loss, speed and time left, in terminals of any usual width."""

import fcntl
import os
import re
import struct
import sys
import termios
from dataclasses import replace
from threading import Thread

import pytest

from config import Phase, Widen
from tests.helpers.small_runs import TRAINING

LONG_NAME = "a_name_of_20_letters"


@pytest.fixture
def terminal(monkeypatch):
    """Makes a pseudo-terminal of so many columns stderr. Returns a function that ends it and gives
    all that was written to it."""
    ends = []

    def terminal(columns: int):
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        written: list[bytes] = []

        def read() -> None:
            try:
                while data := os.read(master, 4096):
                    written.append(data)
            except OSError:  # how Linux says that the other end is closed
                pass

        reader = Thread(target=read)
        reader.start()
        stream = os.fdopen(slave, "w")
        monkeypatch.setattr(sys, "stderr", stream)

        def end() -> str:
            if not stream.closed:
                stream.close()
                reader.join()
                os.close(master)
            return b"".join(written).decode()

        ends.append(end)
        return end

    yield terminal
    monkeypatch.undo()
    for end in ends:
        end()


@pytest.mark.parametrize("columns", [80, 60])
def test_the_bar_of_every_phase_shows_loss_speed_and_time_left_in_one_line(
    columns, train_schedule, terminal
):
    end = terminal(columns)
    training = replace(TRAINING, log_every=1)
    train_schedule(training, short=Phase(steps=3), **{LONG_NAME: Phase(Widen(2), steps=3)})
    lines = re.split(r"[\r\n]+", end())
    assert max(map(len, lines)) <= columns
    bar = re.compile(r"phase (\d).*, loss \d\.\d{3}, [\d.]+ k? ?tokens/s, [\d:]+ left")
    shown = [match[1] for line in lines if (match := bar.match(line))]
    assert {*shown} == {"1", "2"}
    assert any(LONG_NAME in line for line in lines) == (columns == 80)
    assert any("3/3" in line for line in lines)
    assert any("█" in line for line in lines) == (columns == 80)

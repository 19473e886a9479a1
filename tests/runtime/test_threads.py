"""A call into a library keeps no signal waiting."""

import os
import signal
import threading
from functools import partial

import pytest

from utils.runtime.signals import Stopped, raise_on_signals
from utils.runtime.threads import call_interruptibly


def test_a_call_returns_its_result_or_raises_its_error():
    assert call_interruptibly(lambda: "done", tick=lambda: None) == "done"
    with pytest.raises(ZeroDivisionError):
        call_interruptibly(lambda: 1 / 0, tick=lambda: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_call_that_would_never_end_is_left_at_a_signal(number):
    never = threading.Event()
    send = partial(os.kill, os.getpid(), number)
    with pytest.raises(Stopped, match=number.name), raise_on_signals():
        call_interruptibly(never.wait, tick=send)
    never.set()

"""SIGTERM and Ctrl-C: a run stops between two steps, keeps a point to resume from, and says so."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asks the run to stop. It is no Exception, so that nothing takes it for an error."""

    def __init__(self, number: int, next_step: str = "run the same command again"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {next_step}")
        self.number = number
        self.exit_code = 128 + number


class SignalState:
    """Which signal has come, and whether it may stop the run now. Signals are the process's, so
    there is one of these."""

    received: int | None = None
    is_deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raises Stopped, or waits while signals are deferred; a second signal leaves at once."""
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if not self.is_deferred:
            raise Stopped(number)


signal_state = SignalState()


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Makes the handled signals raise Stopped within."""
    signal_state.received, signal_state.is_deferred = None, False
    before = {number: signal.signal(number, signal_state.handle) for number in HANDLED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Makes a signal wait until the end: what is done within is done wholly."""
    was_deferred, earlier = signal_state.is_deferred, signal_state.received
    signal_state.is_deferred = True
    try:
        yield
    finally:
        signal_state.is_deferred = was_deferred
    if signal_state.received is not None and earlier is None and not was_deferred:
        raise Stopped(signal_state.received)

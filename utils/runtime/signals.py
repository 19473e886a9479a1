"""Signals that ask a run to stop: it does so between two steps, keeps a point to resume from, and
says so."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
"""Ctrl-C, what ends processes, a terminal that is closed, and what a job's time limit may send;
those of them that the system has."""
INSISTENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What is sent again to a process that does not end. The others come in numbers for one reason:
a terminal that is closed may send SIGHUP twice, a job's time limit SIGTERM after SIGUSR1."""


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
    owns_process = False
    """Whether a command is the process, which a second insistent signal then ends."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raises Stopped, or waits while signals are deferred. Later signals are ignored, but for a
        second insistent one where a command is the process: it leaves at once."""
        is_first = self.received is None
        if not is_first and number not in INSISTENT_SIGNALS:
            return
        if self.received in INSISTENT_SIGNALS:
            if self.owns_process:
                os._exit(128 + number)
            return
        self.received = number
        if is_first and not self.is_deferred:
            raise Stopped(number)


signal_state = SignalState()


@contextmanager
def raise_on_signals(owns_process: bool = False) -> Iterator[None]:
    """Makes the handled signals raise Stopped within, unless they do so already, or this thread can
    handle none. `owns_process` lets a second insistent signal end the process.

    SIGHUP stays ignored where it is: `nohup` says that the run outlives its terminal.
    """
    is_handled = signal.getsignal(signal.SIGINT) == signal_state.handle
    if is_handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal_state.received, signal_state.is_deferred = None, False
    signal_state.owns_process = owns_process
    before = {
        number: signal.signal(number, signal_state.handle)
        for number in HANDLED_SIGNALS
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Makes a signal wait until the end: what is done within is done wholly. No other thread than
    the main one is interrupted by signals, so that there is nothing to defer there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_deferred, earlier = signal_state.is_deferred, signal_state.received
    signal_state.is_deferred = True
    try:
        yield
    finally:
        signal_state.is_deferred = was_deferred
    if signal_state.received is not None and earlier is None and not was_deferred:
        raise Stopped(signal_state.received)

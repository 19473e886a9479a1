"""SIGTERM and Ctrl-C: a run stops between two steps, keeps where it stands, and says so."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asks the run to stop. No Exception, so that nothing takes it for an error."""

    def __init__(self, number: int, way_on: str = "run the same command again"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {way_on}")
        self.number = number
        self.exit_code = 128 + number


class Watch:
    """What came in, and whether the moment is one at which to stop. Signals are the process's, so
    there is one of these."""

    received: int | None = None
    held = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # the second time: at once
            os._exit(128 + number)
        self.received = number
        if not self.held:
            raise Stopped(number)


watch = Watch()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, the signals raise Stopped."""
    watch.received, watch.held = None, False
    before = {number: signal.signal(number, watch.handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Within, a signal waits: what is done here is done wholly."""
    was_held, earlier = watch.held, watch.received
    watch.held = True
    try:
        yield
    finally:
        watch.held = was_held
    if watch.received is not None and earlier is None and not was_held:
        raise Stopped(watch.received)

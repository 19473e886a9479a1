"""Long calls into libraries, in a thread beside the main one, which handles signals meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.1
"""Seconds between two looks at a thread, and so until a signal is handled."""


def start_thread(call: Callable[[], T]) -> tuple[Future[T], Thread]:
    """Starts a call in a thread that does not keep the process alive. Returns its result, which may
    be an error, and the thread."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # for whoever asks for the result
            result.set_exception(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    return result, thread


def call_interruptibly(call: Callable[[], T], tick: Callable[[], object]) -> T:
    """Returns what a call returns that stays in a library's code for long, and calls `tick` every
    POLL_S meanwhile. A signal that raises is not kept waiting: the call then goes on, and its
    result is lost."""
    result, _ = start_thread(call)
    wait_interruptibly(result, tick)
    return result.result()


def wait_interruptibly(result: Future[Any], tick: Callable[[], object] = lambda: None) -> None:
    """Returns once a result is there, and calls `tick` every POLL_S meanwhile. A signal that raises
    is not kept waiting."""
    while not wait([result], POLL_S).done:
        tick()

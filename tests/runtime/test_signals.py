"""A signal stops a run between two steps, never amid one."""

import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from utils.runtime.signals import HANDLED_SIGNALS, Stopped, defer_signals, raise_on_signals


@pytest.mark.parametrize("number", HANDLED_SIGNALS)
def test_a_signal_raises_and_names_itself_and_its_exit_code(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}; ") as raised, raise_on_signals():
        os.kill(os.getpid(), number)
    assert raised.value.exit_code == 128 + number
    assert not isinstance(raised.value, Exception)


def test_what_is_done_with_signals_deferred_is_done_wholly():
    steps = []
    with pytest.raises(Stopped), raise_on_signals():
        with defer_signals():
            with defer_signals():
                os.kill(os.getpid(), signal.SIGTERM)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")
    assert steps == ["inner", "outer"]


def test_a_terminal_that_is_closed_stops_no_run_that_is_to_outlive_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def run_forked(numbers: Sequence[int], owns_process: bool) -> int:
    """Returns the exit code of a process that gets signals in what is to be done wholly; 0 if it
    was."""
    if not (pid := os.fork()):
        with raise_on_signals(owns_process), raise_on_signals(), defer_signals():
            for number in numbers:
                os.kill(os.getpid(), number)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


ONCE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
AGAIN = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("numbers", [*product(AGAIN, AGAIN)])
def test_who_insists_ends_a_command_but_no_notebook(numbers):
    assert run_forked(numbers, owns_process=True) == 128 + numbers[-1]
    assert run_forked([signal.SIGHUP, *numbers], owns_process=True) == 128 + numbers[-1]
    assert run_forked(numbers, owns_process=False) == 0


@pytest.mark.parametrize("numbers", [*product(ONCE, ONCE + AGAIN), *product(AGAIN, ONCE)])
def test_signals_that_come_together_leave_time_to_do_what_is_begun(numbers):
    assert run_forked(numbers, owns_process=True) == 0


def test_a_thread_that_can_handle_no_signal_runs_all_the_same():
    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: raise_on_signals().__enter__()).result()


def test_no_signal_changes_nothing():
    with raise_on_signals(), defer_signals():
        pass


def test_handlers_that_were_there_before_are_there_again():
    before = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    with raise_on_signals():
        assert all(signal.getsignal(number) not in before for number in HANDLED_SIGNALS)
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == before


def test_a_signal_that_stopped_one_command_does_not_stop_the_next():
    with pytest.raises(Stopped), raise_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
    with raise_on_signals(), defer_signals():
        pass

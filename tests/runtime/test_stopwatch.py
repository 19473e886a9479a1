"""Every moment of a run counts for one kind of work, so that all kinds add up to the whole."""

import random

import pytest

from utils.runtime.stopwatch import TIME_KINDS, Stopwatch


class Clock:
    """Seconds that pass only where a test says so."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def test_time_within_a_kind_does_not_count_for_the_one_around_it():
    clock = Clock()
    stopwatch = Stopwatch(clock=clock)
    clock.sleep(1)
    with stopwatch.counting("growth"):
        clock.sleep(2)
        with stopwatch.counting("evaluation"):
            clock.sleep(4)
        clock.sleep(8)
        with stopwatch.counting("growth"):
            clock.sleep(16)
    clock.sleep(32)
    spent = {kind: seconds for kind, seconds in stopwatch.seconds().items() if seconds}
    assert spent == {"start": 33, "growth": 26, "evaluation": 4}


def test_all_kinds_add_up_to_the_time_since_the_start_at_any_moment():
    clock, chance = Clock(), random.Random(0)
    stopwatch = Stopwatch(started_s=clock() - 5, clock=clock)

    def work(depth: int) -> None:
        for _ in range(3):
            clock.sleep(chance.random())
            with stopwatch.counting(chance.choice(list(TIME_KINDS))):
                clock.sleep(chance.random())
                if depth:
                    work(depth - 1)
            assert stopwatch.now() == pytest.approx(clock() - 95)
            if chance.random() < 0.5:
                assert sum(stopwatch.seconds().values()) == pytest.approx(stopwatch.now())

    work(depth=3)
    assert stopwatch.seconds().keys() == TIME_KINDS.keys()


def test_an_error_ends_what_was_counted():
    clock = Clock()
    stopwatch = Stopwatch(clock=clock)
    with pytest.raises(ZeroDivisionError), stopwatch.counting("samples"):
        clock.sleep(1)
        raise ZeroDivisionError
    clock.sleep(2)
    assert (stopwatch.seconds()["samples"], stopwatch.seconds()["start"]) == (1, 2)


def test_the_seconds_of_a_run_that_is_resumed_are_added():
    clock = Clock()
    first = Stopwatch(clock=clock)
    with first.counting("steps"):
        clock.sleep(3)
    earlier, again = first.seconds(), Stopwatch(clock=clock)
    clock.sleep(1)
    again.add(earlier)
    with again.counting("steps"):
        clock.sleep(4)
    assert again.now() == 8
    assert (again.seconds()["steps"], again.seconds()["start"]) == (7, 1)

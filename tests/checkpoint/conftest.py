"""A run that these tests kill and damage, and what it comes to undisturbed."""

from dataclasses import replace

import pytest

from config import Run
from tests.helpers.killed_runs import (
    Outcome,
    StartRun,
    make_start_run,
    read_outcome,
    wait_for_exit,
)
from tests.helpers.small_runs import FOUR_PHASES, small_run


@pytest.fixture(scope="session")
def start_run() -> StartRun:
    return make_start_run()


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory) -> Run:
    steps = {f"steps_phase{number}": steps for number, steps in enumerate((9, 7, 6, 6), 1)}
    training = replace(FOUR_PHASES, **steps, sample_tokens=4, checkpoint_every="2")
    return small_run(tmp_path_factory.mktemp("undisturbed"), training)


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run, start_run) -> Outcome:
    assert wait_for_exit(start_run(undisturbed_run)) == 0
    return read_outcome(undisturbed_run)


@pytest.fixture
def run(undisturbed_run, tmp_path) -> Run:
    """The same run in a folder of its own, with the tokens of the first."""
    return replace(undisturbed_run, out=tmp_path / "run")

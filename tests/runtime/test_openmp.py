"""Threads that wait do not spin for long, unless the user says so."""

import os

import pytest

from tests.helpers.scripts import run_script
from utils.runtime import openmp
from utils.runtime.cli import run_command
from utils.runtime.openmp import NO_SPINNING, SPIN_COUNT

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def environment_within(own, running, monkeypatch, tmp_path):
    """The variables that a command sees, given the user's own and how many threads are running."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    stat = tmp_path / "stat"
    stat.write_text(f"cpu  1 2 3\nprocs_running {running}\nprocs_blocked 0\n")
    monkeypatch.setattr(openmp, "PROCESSES", stat)
    seen = {}
    run_command(lambda: seen.update({n: os.environ[n] for n in NAMES if n in os.environ}))
    return seen


@pytest.mark.parametrize(
    "own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": ""}]
)
def test_a_command_limits_spinning_where_the_user_has_not_set_it(own, monkeypatch, tmp_path):
    seen = environment_within(own, 1, monkeypatch, tmp_path)
    assert seen == (own or {"GOMP_SPINCOUNT": SPIN_COUNT})


def test_nothing_spins_where_others_keep_all_cores_busy(monkeypatch, tmp_path):
    cores = os.cpu_count() or 1
    for others, count in ((cores - 1, SPIN_COUNT), (cores, NO_SPINNING), (99, NO_SPINNING)):
        seen = environment_within({}, others + 1, monkeypatch, tmp_path)
        assert seen == {"GOMP_SPINCOUNT": count}


def test_a_system_that_does_not_tell_what_runs_is_taken_to_be_idle(monkeypatch, tmp_path):
    monkeypatch.setattr(openmp, "PROCESSES", tmp_path / "none")
    assert openmp.count_busy_others() == 0


def test_it_is_limited_before_torch_is_imported():
    run_script(
        "import os, sys\n"
        "from utils.runtime.cli import run_command\n"
        "def command():\n"
        "    assert {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & os.environ.keys()\n"
        "    assert 'torch' not in sys.modules\n"
        "run_command(command)"
    )

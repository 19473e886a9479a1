"""Threads that wait do not spin for long, unless the user says so."""

import os

import pytest

from tests.helpers.scripts import run_script
from utils.runtime.cli import run_command
from utils.runtime.openmp import SPIN_COUNT

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    "own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": ""}]
)
def test_a_command_limits_spinning_where_the_user_has_not_set_it(own, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    seen = {}
    run_command(lambda: seen.update({n: os.environ[n] for n in NAMES if n in os.environ}))
    assert seen == (own or {"GOMP_SPINCOUNT": SPIN_COUNT})


def test_it_is_limited_before_torch_is_imported():
    run_script(
        "import sys\n"
        "from utils.runtime import openmp\n"
        "from utils.runtime.cli import run_command\n"
        "run_command(lambda: None)\n"
        "assert 'torch' not in sys.modules"
    )

"""Runs a script in a process of its own, where nothing of the tests' is loaded."""

import os
import subprocess
import sys


def run_script(script: str) -> None:
    """Runs a script, which must end with exit code 0 within a minute."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr

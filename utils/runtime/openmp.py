"""How the threads of OpenMP wait for each other."""

import os
import time
from pathlib import Path

SPIN_COUNT, NO_SPINNING = "4000", "0"
"""Turns of a loop, some microseconds, after which a waiting thread sleeps; or at once."""
PROCESSES = Path("/proc/stat")
NUM_LOOKS, LOOK_EVERY_S = 3, 0.005
"""How often to look at what else runs: what is there only once is no lasting load."""


def limit_spinning() -> None:
    """Lets a waiting thread of GNU's OpenMP sleep after some microseconds, or at once where other
    processes keep all cores busy. Call it before torch is imported; what the user has set by hand
    stays, and no result depends on it.

    By default such a thread spins for milliseconds, and on a busy machine takes the core from the
    thread that it waits for. docs/performance.md has what that costs (A busy machine).
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        is_busy = count_busy_others() >= (os.cpu_count() or 1)
        os.environ["GOMP_SPINCOUNT"] = NO_SPINNING if is_busy else SPIN_COUNT


def count_busy_others() -> int:
    """Returns how many other threads of the machine want a core for a while; 0 where the system
    does not tell."""
    counts = []
    for look in range(NUM_LOOKS):
        if not PROCESSES.exists():
            return 0
        time.sleep(LOOK_EVERY_S * (look > 0))
        fields = dict(line.split(maxsplit=1) for line in PROCESSES.read_text().splitlines())
        counts.append(int(fields.get("procs_running", 1)))
    return min(counts) - 1  # without this one

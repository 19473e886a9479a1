"""Trains a small language model that grows as it goes: dense, mixture of experts, wider, deeper.

    python train.py [PRESET] [--field value ...]

PRESET is a function in config.py, or my_schedule.py with one of your own.

A run is a list of phases (config.py). Before a phase the model may grow; the same probe tokens
judge it before and after, and the run stops where its function moved.
"""

import sys
from pathlib import Path

from config import Run
from utils.runtime.cli import parse_run, run_command
from utils.runtime.stopwatch import COMMAND_STARTED_S


def main(run: Run, started_s: float | None = None) -> None:
    """Trains every phase of a run, or those that are left of it. Its time counts from `started_s`
    by `time.perf_counter`, from when its folder is opened if None."""
    from utils.checkpoint.run_dir import is_finished  # torch takes a second: first the options
    from utils.training.context import (
        announce_dry_run,
        announce_run,
        check_run,
        finish_run,
        open_run,
        prepare_run,
    )
    from utils.training.phase import grow_and_verify, save_phase, train_phase

    init_source = check_run(run)  # every setting, before any work
    if run.resume and is_finished(run.out):
        return finish_run(init_source)
    setup = prepare_run(init_source)  # the tokens, and what follows from them
    if run.dry_run:
        return announce_dry_run(setup)
    announce_run(setup)
    with open_run(setup, started_s) as context:  # the folder's lock, the history, the last point
        state, progress = context.start()
        for phase in context.phases_from(progress):
            if phase.growth and not progress.is_inside(phase):  # a resumed phase has grown already
                state = grow_and_verify(state, phase, context)  # probe check: did it stay the same?
            state = train_phase(state, phase, context, progress)
            save_phase(state, phase, context)
    return None


def adopt_run_settings(default: Run, out: Path) -> Run:
    """Returns a preset's run with the settings that the run in `out` was left with."""
    from utils.checkpoint.resume import adopt_settings

    return adopt_settings(default, out)


if __name__ == "__main__":
    run_command(lambda: main(parse_run(sys.argv[1:], adopt_run_settings), COMMAND_STARTED_S))

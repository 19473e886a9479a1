"""Trains what the variants of an experiment share, then each of them, and prints a report."""

import json
import os
from copy import deepcopy
from dataclasses import asdict, replace

from tqdm import tqdm

from transfer import TrainState
from utils.checkpoint.resume import (
    ResumeCheckpointer,
    TrainingProgress,
    flatten_settings,
    latest_point,
)
from utils.checkpoint.run_dir import is_finished, lock_run_dir
from utils.experiment.records import keep_experiment
from utils.experiment.report import Histories, format_report
from utils.experiment.variants import Experiment
from utils.metrics.history import HISTORY_FILE, History, read_history, run_record
from utils.optim.adamw import place_state
from utils.runtime.formatting import wrap_lines
from utils.runtime.stopwatch import Stopwatch
from utils.schedule.memory import check_memory
from utils.schedule.phases import resolve_phases
from utils.training.context import RunContext, RunSetup, check_run, prepare_run
from utils.training.phase import grow_and_verify, save_phase, train_phase

WITHOUT_EFFECT = (
    "data.", "dry_run", "out", "overwrite", "resume", "tracker", "training.checkpoint_every",
)  # fmt: skip
"""Settings under which a variant comes out the same, by the start of their names. (The tokens
themselves are compared.)"""


def run_experiment(experiment: Experiment) -> None:
    """Trains whatever of an experiment is not trained yet, keeps the thinned histories of all of it
    in one file, and prints how its variants compare.

    Raises:
        InputError: naming the field, for anything that its runs cannot be.
        RunStopped: if a run cannot go on.
    """
    # Nothing that a run writes is written into `out` itself, so that it may hold another run.
    setup = prepare_run(check_run(replace(experiment.base_run(), resume=False, dry_run=True)))
    check_memory(setup.phases, setup.run, setup.device)
    run = replace(experiment.run, model=setup.run.model, data=setup.run.data)
    experiment = replace(experiment, run=run)
    runs = experiment.variant_runs()
    for name in experiment.variant_names():
        if name not in runs:
            tqdm.write(f"{name} is left out: it comes to the same growth as one before it")
    trunk = experiment.trunk_run()
    grown = setup.init_source.growth_history
    state = trunk_state(setup._replace(run=trunk, phases=resolve_phases(trunk, grown)))
    histories: Histories = {}
    for name, seeded_runs in runs.items():
        for run in seeded_runs:
            tqdm.write(f"\n{name}, seed {run.seed}")
            variant = setup._replace(run=run, phases=resolve_phases(run, grown))
            events = train_variant(variant, state)
            histories.setdefault(name, []).append(events)
    record = experiment.run.out / f"{experiment.name}.jsonl"
    keep_experiment(record, experiment.name, histories)
    print(wrap_lines(f"\n{format_report(histories)}\n\nhistories: {record}"))


def trunk_state(setup: RunSetup) -> TrainState:
    """Returns what every variant starts from, on the CPU: the state after all phases of the trunk's
    run but the last. They are trained once.

    Raises:
        InputError: if the trunk's folder holds another run.
    """
    run, fingerprint = setup.run, setup.fingerprint()
    phases = setup.phases[:-1]
    end = phases[-1].number, phases[-1].steps
    with lock_run_dir(run.out):
        point = latest_point(run.out, fingerprint, tqdm.write)
        if point is None or (point.progress.phase, point.progress.step) != end:
            (run.out / HISTORY_FILE).unlink(missing_ok=True)
            writer = setup.make_writer(stopwatch := Stopwatch())
            history = History(run.out / HISTORY_FILE, stopwatch.now)
            with history, writer.finished():
                checkpointer = ResumeCheckpointer(run, fingerprint, history, writer)
                trunk = setup._replace(phases=phases)
                context = RunContext.from_setup(trunk, history, checkpointer)
                state, progress = context.start()
                for phase in context.phases_from(progress):  # from the first: no point is used
                    if phase.growth:
                        state = grow_and_verify(state, phase, context)
                    state = train_phase(state, phase, context, progress)
                    save_phase(state, phase, context)
            point = latest_point(run.out, fingerprint, tqdm.write)
        assert point is not None, "the end of a phase is always kept"
        return point.state


def train_variant(setup: RunSetup, state: TrainState) -> list[dict]:
    """Returns the history of the last phase of a variant's run, grown out of `state`, which is left
    as it was. A variant that was stopped is trained again from its growth on."""
    run, phase, path = setup.run, setup.phases[-1], setup.run.out / HISTORY_FILE
    if not is_trained(setup):
        with lock_run_dir(run.out):
            path.unlink(missing_ok=True)
            stopwatch = Stopwatch()
            with History(path, stopwatch.now) as history:
                context = RunContext.from_setup(setup, history, stopwatch=stopwatch)
                context.counted_from = phase.number
                context.record_start()
                context.begin_phase(history.now())
                own_state = place_state(deepcopy(state), run.training, setup.device)
                grown = grow_and_verify(own_state, phase, context)
                train_phase(grown, phase, context, TrainingProgress.start_of(phase=0))
                context.record_end()
    return read_history(path)


def is_trained(setup: RunSetup) -> bool:
    """Whether a variant is finished already, on the same text and with the same settings."""
    run = setup.run
    if not is_finished(run.out):
        return False
    record = run_record(read_history(run.out / HISTORY_FILE))
    wanted = json.loads(json.dumps(asdict(run), default=os.fspath))
    before, now = (
        {name: value for name, value in flat.items() if not name.startswith(WITHOUT_EFFECT)}
        for flat in (flatten_settings(record.get("config", {})), flatten_settings(wanted))
    )
    sources = setup.corpus.fingerprint, setup.init_source.fingerprint or None
    return before == now and sources == (record["fingerprint"], record["init_fingerprint"])

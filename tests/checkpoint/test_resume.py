"""A resume point holds all that a run needs to go on, and says which runs may."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from config import InputError, Phase, Tolerance, Widen
from tests.helpers.small_models import MOE, random_train_state
from tests.helpers.small_runs import FOUR_PHASES, TRAINING, small_run
from utils.checkpoint.background import BackgroundWriter
from utils.checkpoint.resume import (
    KEPT_POINTS,
    ResumeCheckpointer,
    TrainingProgress,
    latest_point,
    resume_points,
    run_fingerprint,
)
from utils.checkpoint.run_dir import lock_run_dir
from utils.metrics.history import HISTORY_FILE, History
from utils.metrics.throughput import AccumulatorState
from utils.runtime.errors import RunStopped
from utils.schedule.phases import resolve_phases

CPU = torch.device("cpu")
RUN = small_run(Path("folder"), replace(FOUR_PHASES, steps_phase2=20, checkpoint_every="3"))
PHASES = resolve_phases(RUN)
FINGERPRINT = run_fingerprint(RUN, "tokens", CPU)
METRICS = AccumulatorState(torch.arange(4.0), 3, 96, 0.5)
PROGRESS = TrainingProgress(2, 17, METRICS, 1234, 7.25, 640, 2816, 1e-3)


def train_with(run, **changes):
    return replace(run, training=replace(run.training, **changes))


CHANGES_NOTHING = {
    "out": lambda run: replace(run, out=Path("elsewhere")),
    "resume": lambda run: replace(run, resume=True),
    "tracker": lambda run: replace(run, tracker="tensorboard"),
    "precision": lambda run: replace(run, precision="fp32"),
    "data.cache": lambda run: replace(run, data=replace(run.data, cache=Path("elsewhere"))),
    "training.micro_batch_size": lambda run: train_with(run, micro_batch_size=1),
    "training.checkpoint_every": lambda run: train_with(run, checkpoint_every="9min"),
    "training.cuda_graph": lambda run: train_with(run, cuda_graph="off"),
    "training.fused_kernels": lambda run: train_with(run, fused_kernels=False),
    "training.low_memory": lambda run: train_with(run, low_memory=True),
    "training.widen.tolerance": lambda run: train_with(run, widen=Widen(tolerance=Tolerance(1.0))),
}
CHANGES_THE_RUN = {
    "seed": lambda run: replace(run, seed=1),
    "model.d_ff": lambda run: replace(run, model=replace(run.model, d_ff=64)),
    "training.widen.noise": lambda run: train_with(run, widen=Widen(noise=0.5)),
    "training.optimizer_state_on_growth": lambda run: train_with(
        run, optimizer_state_on_growth="reset"
    ),
    "training.probe_sequences": lambda run: train_with(run, probe_sequences=7),
}
ADJUSTS_THE_RUN = {
    "steps_phase2": 17,
    "steps_phase4": 9,
    "lr_phase2": 1.0,
    "batch_size": 3,
    "batch_size_phase3": 3,
    "lr_scaling": "none",
    "weight_decay": 1.0,
    "grad_clip": 2.0,
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 1e-3,
    "warmup_fraction": 0.5,
    "min_lr_ratio": 0.5,
    "decay_to": "floor",
    "load_balance_coef": 1.0,
    "z_loss_coef": 1.0,
    "log_every": 7,
    "eval_every": 7,
    "eval_tokens": 70,
    "final_eval_tokens": 700,
    "sample_tokens": 7,
}
"""Settings of `training` that may change in phase 2 after step 17 of 20."""


@pytest.fixture
def checkpointer(tmp_path):
    """A checkpointer of a run that has only begun."""
    with lock_run_dir(tmp_path), History(tmp_path / HISTORY_FILE) as history:
        yield ResumeCheckpointer(
            replace(RUN, out=tmp_path), FINGERPRINT, history, BackgroundWriter(in_place=True)
        )


def load_latest(out):
    """The last point of this test's run, with nothing to warn of."""
    point = latest_point(out, FINGERPRINT, pytest.fail, PHASES)
    assert point is not None and not point.changes
    return point.progress, point.state


def test_what_was_kept_is_loaded_bit_for_bit(checkpointer, tmp_path):
    state = random_train_state(MOE)
    checkpointer.keep(PROGRESS, state)
    progress, loaded = load_latest(tmp_path)
    assert_close(progress.metrics, PROGRESS.metrics, rtol=0, atol=0)
    assert progress._replace(metrics=None) == PROGRESS._replace(metrics=None)
    assert loaded.config == MOE and list(loaded.weights) == list(state.weights)
    assert_close(loaded.weights, state.weights, rtol=0, atol=0)
    assert_close(loaded.adam, state.adam, rtol=0, atol=0)


def test_the_last_points_are_kept_in_order_and_older_ones_removed(checkpointer, tmp_path):
    state = random_train_state(MOE)
    moments = [(1, 9), (1, 10), (2, 0), (10, 3)]
    for phase, step in moments:
        checkpointer.keep(PROGRESS._replace(phase=phase, step=step), state)
    names = [path.name for path in resume_points(tmp_path)]
    assert names == ["phase002-step00000000.pt", "phase010-step00000003.pt"]
    assert len(names) == KEPT_POINTS
    progress, _ = load_latest(tmp_path)
    assert (progress.phase, progress.step) == moments[-1]


def test_a_moment_that_is_kept_already_is_not_written_again(checkpointer, tmp_path):
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    (path,) = resume_points(tmp_path)
    before = path.stat()
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    assert path.stat() == before


def test_weights_that_are_not_finite_are_named_and_not_kept(checkpointer, tmp_path):
    state = random_train_state(MOE)
    state.weights["norm.weight"][0] = torch.nan
    with pytest.raises(RunStopped, match=r"^phase 2, step 17: norm\.weight is not finite"):
        checkpointer.keep(PROGRESS, state)
    assert not resume_points(tmp_path)


def test_a_point_is_due_every_so_many_steps_and_at_the_end_of_a_phase(checkpointer):
    assert [step for step in range(9) if checkpointer.is_due(step, last_step=8)] == [3, 6, 8]
    assert checkpointer.is_due(0, last_step=0)


@pytest.mark.parametrize("change", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_settings_that_train_nothing_may_change_before_a_resumption(change):
    changed = change(RUN)
    assert changed != RUN
    assert not FINGERPRINT.changes(run_fingerprint(changed, "tokens", CPU))


def load_as(run, out):
    """What is loaded for a run in the folder of this test's run."""
    fingerprint = run_fingerprint(run, "tokens", CPU)
    return latest_point(out, fingerprint, pytest.fail, resolve_phases(run))


@pytest.mark.parametrize("name, value", ADJUSTS_THE_RUN.items(), ids=ADJUSTS_THE_RUN)
def test_what_has_a_part_only_in_steps_to_come_may_change_and_is_told(
    name, value, checkpointer, tmp_path
):
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    point = load_as(train_with(RUN, **{name: value}), tmp_path)
    assert point.changes == [(f"training.{name}", getattr(RUN.training, name), value)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr_phase1": 1.0}, "lr_phase1 was 0.0003, is 1.0, but phase 1 (dense) has been trained"),
        ({"steps_phase1": 9}, "steps_phase1 was 5, is 9, but phase 1 (dense) has been trained"),
        ({"steps_phase2": 16}, "phase 2 (moe) has taken 17 steps already, it cannot end after 16"),
        ({"steps_phase2": 17, "lr_phase2": 1.0}, "is 1.0, but phase 2 (moe) has been trained"),
        ({"probe_sequences": 7, "lr_phase1": 1.0}, "another run: training.probe_sequences was 8"),
    ],
)
def test_what_would_have_no_part_in_the_steps_to_come_is_refused(
    changes, message, checkpointer, tmp_path
):
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    with pytest.raises(InputError, match=re.escape(message)):
        load_as(train_with(RUN, **changes), tmp_path)


def test_a_schedule_of_ones_own_changes_by_the_names_of_its_phases(checkpointer, tmp_path):
    phases = {"a.b": Phase(steps=3), "c": Phase(steps=20), "d": Phase(steps=5)}
    own = replace(RUN, training=TRAINING, phases=phases)
    checkpointer.fingerprint = run_fingerprint(own, "tokens", CPU)
    checkpointer.keep(PROGRESS, random_train_state(MOE))

    def load_with(**changed):
        return load_as(replace(own, phases=phases | changed), tmp_path)

    changes = load_with(d=Phase(steps=6), c=Phase(steps=20, lr=1.0)).changes
    assert changes == [("phases.c.lr", 3e-4, 1.0), ("phases.d.steps", 5, 6)]
    with pytest.raises(InputError, match=r"phases.a.b.lr was 0.0003, is 1.0, but phase 1 \(a\.b"):
        load_with(**{"a.b": Phase(steps=3, lr=1.0)})
    with pytest.raises(InputError, match=r"another run: phases.c.growth.factor was None, is 2"):
        load_with(c=Phase(Widen(2), steps=20))
    swapped = {name: phases[name] for name in ("c", "a.b", "d")}
    with pytest.raises(InputError, match=r"another run: phases was \['a.b', 'c', 'd'\], is \['c'"):
        load_as(replace(own, phases=swapped), tmp_path)


@pytest.mark.parametrize("name, change", CHANGES_THE_RUN.items(), ids=CHANGES_THE_RUN)
def test_every_other_setting_that_changed_is_named(name, change, checkpointer, tmp_path):
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    with pytest.raises(InputError, match=rf"holds another run: {name} was \S+, is \S+$"):
        load_as(change(RUN), tmp_path)


def test_the_tokens_and_the_model_that_a_run_started_from_may_not_change():
    tokens = run_fingerprint(RUN, "others", CPU)
    assert FINGERPRINT.changes(tokens) == [("corpus (fingerprint)", "tokens", "others")]
    model = run_fingerprint(RUN, "tokens", CPU, init_source="theirs")
    assert FINGERPRINT.changes(model) == [("init_from (fingerprint)", None, "theirs")]

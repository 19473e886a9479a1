"""A resume point holds all that a run needs to go on, and says which runs may."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from config import InputError, Tolerance, Widen
from tests.helpers.small_models import MOE, random_train_state
from tests.helpers.small_runs import FOUR_PHASES, small_run
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

CPU = torch.device("cpu")
RUN = small_run(Path("folder"), replace(FOUR_PHASES, checkpoint_every="3"))
FINGERPRINT = run_fingerprint(RUN, "tokens", CPU)
PROGRESS = TrainingProgress(2, 17, AccumulatorState(torch.arange(4.0), 3, 0.5), 1234, 7.25)


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
    "training.lr_phase1": lambda run: train_with(run, lr_phase1=1.0),
    "training.widen.noise": lambda run: train_with(run, widen=Widen(noise=0.5)),
    "training.lr_scaling": lambda run: train_with(run, lr_scaling="none"),
    "training.eval_every": lambda run: train_with(run, eval_every=7),
}


@pytest.fixture
def checkpointer(tmp_path):
    """A checkpointer of a run that has only begun."""
    with lock_run_dir(tmp_path), History(tmp_path / HISTORY_FILE) as history:
        yield ResumeCheckpointer(replace(RUN, out=tmp_path), FINGERPRINT, history)


def load_latest(out):
    """The last point of this test's run, with nothing to warn of."""
    point = latest_point(out, FINGERPRINT, pytest.fail)
    assert point is not None
    return point


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
    assert not FINGERPRINT.differences(run_fingerprint(changed, "tokens", CPU))


@pytest.mark.parametrize("name, change", CHANGES_THE_RUN.items(), ids=CHANGES_THE_RUN)
def test_every_other_setting_that_changed_is_named(name, change, checkpointer, tmp_path):
    checkpointer.keep(PROGRESS, random_train_state(MOE))
    changed = run_fingerprint(change(RUN), "tokens", CPU)
    with pytest.raises(InputError, match=rf"holds another run: {name} was \S+, is \S+$"):
        latest_point(tmp_path, changed, pytest.fail)


def test_the_tokens_and_the_model_that_a_run_started_from_may_not_change():
    tokens = run_fingerprint(RUN, "others", CPU)
    assert FINGERPRINT.differences(tokens) == ["corpus (fingerprint) was tokens, is others"]
    model = run_fingerprint(RUN, "tokens", CPU, init_source="theirs")
    assert FINGERPRINT.differences(model) == ["init_from (fingerprint) was None, is theirs"]

"""Runs that tests of the training carry out, on tokens that they share."""

from dataclasses import replace

import pytest

from config import ModelConfig, Phase, Run, TrainingConfig
from tests.helpers.small_runs import MODEL, TRAINING, small_run
from train import main
from utils.checkpoint.model import Checkpoint, load_checkpoint
from utils.metrics.history import HISTORY_FILE, read_history


@pytest.fixture(scope="session")
def base_run(tmp_path_factory) -> Run:
    """A run through all four phases."""
    return replace(small_run(tmp_path_factory.mktemp("training")), seed=2)


@pytest.fixture(scope="session")
def finished(base_run, tmp_path_factory) -> Run:
    """That run, finished."""
    run = replace(base_run, out=tmp_path_factory.mktemp("finished") / "run")
    main(run)
    return run


@pytest.fixture
def train_schedule(base_run, tmp_path):
    """A function that trains phases of its own in float32, in a new folder each time. It returns
    the history and each phase's checkpoint."""

    def train_schedule(
        training: TrainingConfig = TRAINING, model: ModelConfig = MODEL, **phases: Phase
    ) -> tuple[list[dict], list[Checkpoint]]:
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run = replace(
            base_run, model=model, training=training, phases=phases, out=out, precision="fp32"
        )
        main(run)
        checkpoints = [load_checkpoint(out / f"{name}_final.pt") for name in phases]
        return read_history(out / HISTORY_FILE), checkpoints

    return train_schedule

"""Small runs: a model of 27 thousand parameters through all four phases, in a second or two."""

from dataclasses import replace
from pathlib import Path

import pytest

from config import Deepen, Run, TrackerName, TrainingConfig, Upcycle, tiny
from utils.metrics.history import HISTORY_FILE, PLOT_FILE, read_history, time_spent
from utils.runtime.stopwatch import TIME_KINDS

MODEL = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=32)
TRAINING = TrainingConfig(log_every=2, eval_every=3, eval_tokens=400, sample_tokens=6)
"""How a run with phases of its own is trained."""
FOUR_PHASES = replace(
    TRAINING,
    steps_phase1=5,
    steps_phase2=5,
    steps_phase3=4,
    steps_phase4=4,
    batch_size=4,
    upcycle=Upcycle(4),
    deepen=Deepen(2),
)
GROWTHS = (FOUR_PHASES.upcycle, FOUR_PHASES.widen, FOUR_PHASES.deepen)
CHECKPOINTS = [
    "dense_model.pt",
    "moe_model_init.pt",
    "moe_model_final.pt",
    "medium_moe_final.pt",
    "large_moe_final.pt",
]
RUN_FILES = {*CHECKPOINTS, HISTORY_FILE, PLOT_FILE}
"""All that a finished run leaves."""


def small_run(
    folder: Path, training: TrainingConfig = FOUR_PHASES, tracker: TrackerName = "none"
) -> Run:
    """Returns a run on the CPU that writes into `folder`/run and keeps its tokens in
    `folder`/cache."""
    data = replace(tiny().data, num_stories=200, cache=folder / "cache")
    out = folder / "run"
    return Run(model=MODEL, training=training, data=data, out=out, device="cpu", tracker=tracker)


def comparable_history(out: Path) -> list[dict]:
    """Returns a run's history without timings, the commit, and the settings, some of which say only
    how the run was called."""
    events = read_history(out / HISTORY_FILE)
    for name in ("config", "commit"):
        del events[0][name]
    return [{k: v for k, v in event.items() if not k.endswith("_s")} for event in events]


def assert_times_add_up(events: list[dict]) -> None:
    """Asserts that a finished run's time never goes back, and that what it was spent on is all of
    it."""
    times = [event["wall_s"] for event in events]
    assert times == sorted(times)
    spent = time_spent(events[-1])
    assert spent.keys() == TIME_KINDS.keys()
    assert sum(spent.values()) == pytest.approx(times[-1], abs=1e-3)

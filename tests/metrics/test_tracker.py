import sys
from types import ModuleType

import pytest

from config import InputError, Run
from utils.metrics import tracker
from utils.metrics.history import HISTORY_FILE, History
from utils.metrics.tracker import start_tracker, tracked_numbers

LOSSES = [{"tokens": 100 * step, "loss": 1 / step} for step in range(1, 5)]


class FakeWriter:
    """Stands in for tensorboard's writer, which is not there on every machine."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.written, self.num_flushed = folder, purge_step, [], 0

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))

    def flush(self):
        self.num_flushed = len(self.written)


@pytest.fixture
def writers(monkeypatch):
    """The writers that are started, in order."""

    def start_writer(*args, **kwargs):
        started.append(FakeWriter(*args, **kwargs))
        return started[-1]

    started = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = start_writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return started


def record(path, events, track, length=None):
    """Writes steps into a history and a tracker. Returns the history's size in bytes."""
    with History(path, length=length, also=track) as history:
        for event in events:
            history("step", phase=1, phase_name="dense", step=3, **event)
        return history.size()


def record_and_resume(folder):
    """Records LOSSES in a run that was stopped after a third step of which nothing is left."""
    path = folder / HISTORY_FILE
    size = record(path, LOSSES[:2], start_tracker("tensorboard", folder))
    record(path, [{"tokens": 300, "loss": 99.0}], start_tracker("tensorboard", folder))
    record(path, LOSSES[2:], start_tracker("tensorboard", folder), length=size)


def scalars(events):
    return [("step/loss", event["loss"], event["tokens"]) for event in events]


def test_only_numbers_that_are_measures_are_tracked():
    event = {"event": "grow", "wall_s": 1.0, "phase": 2, "tokens": 5, "growth": "Widen"}
    measures = {"passed": True, "loss_drift": 0.5, "flipped": 3, "kl": None, "load_min": [[1.0]]}
    assert tracked_numbers(event | measures) == {"grow/loss_drift": 0.5, "grow/flipped": 3}


def test_tensorboard_gets_each_number_at_its_tokens_at_once(writers, tmp_path):
    track = start_tracker("tensorboard", tmp_path)
    with History(tmp_path / HISTORY_FILE, also=track) as history:
        history("run", seed=0)
        for event in LOSSES:
            history("step", step=1, **event)
            assert writers[0].num_flushed == len(writers[0].written)
    (writer,) = writers
    assert writer.folder == str(tmp_path / "tensorboard") and writer.written == scalars(LOSSES)


def test_after_a_resumption_it_shows_what_the_history_holds_and_nothing_twice(writers, tmp_path):
    record_and_resume(tmp_path)
    assert writers[-1].written == scalars(LOSSES)
    assert [writer.purge_step for writer in writers] == [0, 0, 0]


@pytest.mark.parametrize("moment", ["start", "second event"])
def test_a_tracker_that_fails_warns_once_and_the_history_is_whole(
    moment, monkeypatch, tmp_path, capsys
):
    def start_broken(out):
        if moment == "start":
            raise ModuleNotFoundError("gone\naway")
        seen = []

        def log(values, tokens):
            seen.append(tokens)
            if len(seen) > 1:
                raise ConnectionError("gone\naway")

        return log

    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", start_broken)
    path = tmp_path / HISTORY_FILE
    record(path, LOSSES, start_tracker("tensorboard", tmp_path))
    assert len(path.read_text().splitlines()) == len(LOSSES)
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: tracker = tensorboard failed (") and "gone away" in warning


def test_a_tracker_that_there_is_not_is_refused_by_name():
    with pytest.raises(InputError, match="tracker = 'wand' must be 'none' or 'tensorboard'"):
        Run(tracker="wand")


def test_no_tracker_imports_nothing(tmp_path):
    before = set(sys.modules)
    record(tmp_path / HISTORY_FILE, LOSSES, start_tracker("none", tmp_path))
    assert not {name for name in set(sys.modules) - before if "tensorboard" in name}


def test_the_real_tensorboard_reads_back_what_was_written_last(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record_and_resume(tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in read.Scalars("step/loss")]
    assert values == [(event["tokens"], pytest.approx(event["loss"])) for event in LOSSES]

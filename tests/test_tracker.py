import sys
from types import ModuleType

import pytest

from config import InputError, Run
from utils import tracker as module
from utils.history import HISTORY, History
from utils.tracker import numbers, tracker

LOSSES = [{"tokens": 100 * step, "loss": 1 / step} for step in range(1, 5)]


class Writer:
    """Stands in for tensorboard's."""

    def __init__(self, folder, purge_step):
        self.folder, self.purged, self.written = folder, purge_step, []
        made.append(self)

    def add_scalar(self, name, value, step):
        self.written.append((name, value, step))

    def flush(self):
        self.flushed = len(self.written)


made = []


@pytest.fixture
def fake(monkeypatch):
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    made.clear()
    return made


def record(path, events, also, length=None):
    with History(path, length=length, also=also) as history:
        for event in events:
            history("step", phase=1, phase_name="dense", step=3, **event)
        return history.size()


def shown(events):
    return [("step/loss", event["loss"], event["tokens"]) for event in events]


def test_only_numbers_that_are_measures_are_tracked():
    event = {"event": "grow", "wall_s": 1.0, "phase": 2, "tokens": 5, "how": "Widen", "kept": True}
    measures = {"loss_drift": 0.5, "flipped": 3, "twin_distance": None, "expert_load": [[1.0]]}
    assert numbers(event | measures) == {"grow/loss_drift": 0.5, "grow/flipped": 3}


def test_tensorboard_gets_each_number_at_its_tokens_at_once(fake, tmp_path):
    with History(tmp_path / HISTORY, also=tracker("tensorboard", tmp_path)) as history:
        history("run", seed=0)
        for event in LOSSES:
            history("step", step=1, **event)
            assert fake[0].flushed == len(fake[0].written)
    (writer,) = fake
    assert writer.folder == str(tmp_path / "tensorboard") and writer.written == shown(LOSSES)


def test_after_a_resumption_it_shows_what_the_history_holds_and_nothing_twice(fake, tmp_path):
    path = tmp_path / HISTORY
    kept = record(path, LOSSES[:2], tracker("tensorboard", tmp_path))
    record(path, [{"tokens": 300, "loss": 99.0}], tracker("tensorboard", tmp_path))
    record(path, LOSSES[2:], tracker("tensorboard", tmp_path), length=kept)
    assert fake[-1].written == shown(LOSSES)
    assert [writer.purged for writer in fake] == [0, 0, 0]


@pytest.mark.parametrize("at", ["start", "second event"])
def test_a_tracker_that_fails_warns_once_and_the_history_is_whole(
    at, monkeypatch, tmp_path, capsys
):
    def broken(out):
        if at == "start":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        seen = []

        def track(values, tokens):
            seen.append(tokens)
            if len(seen) > 1:
                raise ConnectionError("gone\naway")

        return track

    monkeypatch.setitem(module.TRACKERS, "tensorboard", broken)
    path = tmp_path / HISTORY
    record(path, LOSSES, tracker("tensorboard", tmp_path))
    assert len(path.read_text().splitlines()) == len(LOSSES)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: tracker = tensorboard failed (")
    assert ("No module" in said[0]) == (at == "start") and ("gone away" in said[0]) != (
        at == "start"
    )


def test_a_tracker_that_there_is_not_is_named_and_none_imports_nothing(tmp_path):
    with pytest.raises(InputError, match="tracker = 'wand' must be one of none, tensorboard"):
        Run(tracker="wand")
    before = set(sys.modules)
    record(tmp_path / HISTORY, LOSSES, tracker("none", tmp_path))
    assert not {name for name in set(sys.modules) - before if "tensorboard" in name}


def test_the_real_tensorboard_reads_back_what_was_told_last(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / HISTORY
    kept = record(path, LOSSES[:2], tracker("tensorboard", tmp_path))
    record(path, [{"tokens": 300, "loss": 99.0}], tracker("tensorboard", tmp_path))
    record(path, LOSSES[2:], tracker("tensorboard", tmp_path), length=kept)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = [(event.step, event.value) for event in read.Scalars("step/loss")]
    assert told == [(event["tokens"], pytest.approx(event["loss"])) for event in LOSSES]

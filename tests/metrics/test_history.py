import json
import re
from functools import partial
from pathlib import Path

import pandas
import pytest
import torch
from torch.testing import assert_close

from config import InputError
from utils.metrics.history import (
    HISTORY_FILE,
    History,
    last_metrics,
    loss_above_growth,
    read_history,
    run_record,
    select_events,
    settling_losses,
)

ROOT = Path(__file__).parents[2]


def ticking(*seconds):
    return iter(seconds).__next__


def test_events_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / HISTORY_FILE
    corpus = "b\n\u2028ö"
    with History(path, ticking(0.5, 2.25)) as history:
        history("run", config={"d_ff": 8, "out": Path("a/b")}, corpus=corpus, fallback=False)
        history("eval", valid_loss=1 / 3, expert_load=[[0.1, 0.9], [0.5, 0.5]])
    assert read_history(path) == [
        {
            "event": "run",
            "wall_s": 0.5,
            "config": {"d_ff": 8, "out": "a/b"},
            "corpus": corpus,
            "fallback": False,
        },
        {
            "event": "eval",
            "wall_s": 2.25,
            "valid_loss": 1 / 3,
            "expert_load": [[0.1, 0.9], [0.5, 0.5]],
        },
    ]


def test_every_line_is_json_with_the_event_first_and_is_there_at_once(tmp_path):
    path = tmp_path / HISTORY_FILE
    with History(path) as history:
        for step in range(3):
            history("step", step=step, loss=0.1)
            lines = path.read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
            assert all(line.startswith('{"event": "step", "wall_s": ') for line in lines)
            assert history.size() == path.stat().st_size


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [[0.5, float("nan")]]])
def test_a_number_that_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    path = tmp_path / HISTORY_FILE
    with History(path) as history:
        history("step", loss=1.0)
        with pytest.raises(ValueError, match="grad_norm"):
            history("step", loss=1.0, grad_norm=value)
    assert [event["event"] for event in read_history(path)] == ["step"]


def test_a_line_cut_off_anywhere_is_not_read_and_the_next_run_writes_over_it(tmp_path):
    path = tmp_path / HISTORY_FILE
    whole = b'{"event": "run", "wall_s": 1.0}\n'
    cut_off = '{"event": "step", "wall_s": 2.0, "name": "ö"}'.encode()
    for length in range(len(cut_off) + 1):
        path.write_bytes(whole + cut_off[:length])
        assert [event["event"] for event in read_history(path)] == ["run"]
        with History(path) as history:
            history("end")
        assert [event["event"] for event in read_history(path)] == ["run", "end"]


def test_a_history_goes_on_after_a_length_and_passes_on_every_event_that_it_keeps(tmp_path):
    path, passed_on = tmp_path / HISTORY_FILE, []
    with History(path) as history:
        history("run")
        length = history.size()
        history("step")
    with History(path, length=length, also=passed_on.append) as history:
        history("end")
    assert [event["event"] for event in read_history(path)] == ["run", "end"]
    assert passed_on == read_history(path)


@pytest.mark.parametrize("damage", [b'{"event": "st', b"", b"\0\0", b"\xff{}", b"3", b"{}"])
def test_any_other_damage_is_named_by_file_and_line(tmp_path, damage):
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b'{"event": "run", "wall_s": 0}\n' + damage + b"\n")
    with pytest.raises(InputError, match=rf"{HISTORY_FILE}, line 2"):
        read_history(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        read_history(tmp_path / "absent.jsonl")


def test_time_goes_on_where_the_last_run_stopped(tmp_path):
    path = tmp_path / HISTORY_FILE
    with History(path, ticking(60.0)) as history:
        history("checkpoint")
    with History(path) as history:
        history("end")
    first, last = (event["wall_s"] for event in read_history(path))
    assert first == 60 < last


for_each_recorded_history = pytest.mark.parametrize(
    "path", sorted((ROOT / "docs").glob(f"*/{HISTORY_FILE}")), ids=lambda path: path.parent.name
)


@for_each_recorded_history
def test_pandas_reads_a_column_for_each_field(path):
    frame, events = pandas.read_json(path, lines=True), read_history(path)
    assert len(frame) == len(events) and set(frame) == set().union(*events)
    for name in ("wall_s", "tokens", "loss", "valid_loss", "lr", "grad_norm", "tokens_per_s"):
        values = [event[name] for event in events if name in event]
        assert frame[name].dtype == "float64", name
        assert frame[name].dropna().tolist() == pytest.approx(values, rel=1e-9)


@for_each_recorded_history
def test_the_losses_that_the_documentation_draws_are_the_recorded_ones(path, monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "history.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert "checkpoints/" in code
    names = {}
    exec(code.replace("checkpoints/", f"{path.parent}/"), names)
    names["pyplot"].close(names["figure"])
    training, validation = (line.get_xydata().tolist() for line in names["axes"].lines)
    events = read_history(path)
    as_float64 = partial(torch.tensor, dtype=torch.float64)
    for drawn, kind, name in ((training, "step", "loss"), (validation, "eval", "valid_loss")):
        recorded = [[event["tokens"], event[name]] for event in select_events(events, kind)]
        assert_close(as_float64(drawn), as_float64(recorded))
    assert (tmp_path / "losses.png").stat().st_size


def test_a_field_that_is_not_declared_is_not_written(tmp_path):
    path = tmp_path / HISTORY_FILE
    with History(path) as history:
        history("step", loss=1.0)
        with pytest.raises(AssertionError, match=r"HISTORY_FIELDS\['step'\] lacks lr_mean"):
            history("step", loss=1.0, lr_mean=0.1)
    assert len(read_history(path)) == 1


def test_what_a_growth_cost_is_free_of_what_the_precision_of_training_does_to_a_loss():
    """The evaluations in bf16 are off float32's by 0.01; the growth itself cost 0.3."""
    events = [
        {"event": "eval", "phase": 1, "step": 9, "valid_loss": 2.01},
        {"event": "grow", "phase": 2, "valid_loss_fp32": 2.0},
        {"event": "eval", "phase": 2, "step": 0, "valid_loss": 2.31, "valid_loss_fp32": 2.3},
        {"event": "eval", "phase": 2, "step": 10, "valid_loss": 2.2, "valid_loss_fp32": 2.195},
        {"event": "eval", "phase": 2, "step": 20, "valid_loss": 2.11},
        {"event": "eval", "phase": 2, "step": 50, "valid_loss": 2.06},
        {"event": "eval", "phase": 3, "step": 0, "valid_loss": 2.11},
    ]
    evals, losses = zip(*loss_above_growth(events, 2), strict=True)
    assert list(losses) == pytest.approx([0.3, 0.195, 0.1, 0.05]) and list(evals) == events[2:6]
    assert settling_losses(events, 2) == pytest.approx({0: 0.3, 10: 0.195, 50: 0.05})
    assert loss_above_growth(events, 1) == loss_above_growth(events, 3) == []


def test_the_last_metrics_of_a_phase_are_those_of_its_last_step_and_evaluation():
    position = {"wall_s": 1.0, "phase_name": "a", "tokens": 9, "lr": 0.1, "lr_min": 0.05}
    run = {"event": "run", "wall_s": 0.0, "seed": 3}
    events = [
        run,
        {"event": "step", "phase": 1, "step": 10, "loss": 3.0, "grad_norm": 1.0, **position},
        {"event": "eval", "phase": 1, "step": 10, "valid_loss": 2.9, **position},
        {"event": "step", "phase": 1, "step": 20, "loss": 2.0, "grad_norm": 0.5, **position},
        {"event": "eval", "phase": 2, "step": 0, "valid_loss": 2.5, **position},
    ]
    assert last_metrics(events, 1) == {"loss": 2.0, "grad_norm": 0.5, "valid_loss": 2.9}
    assert last_metrics(events, 2) == {"valid_loss": 2.5}
    assert last_metrics(events, 3) == {}
    assert run_record(events) == run and run_record(events[1:]) == {}
    assert select_events(events, "step") == [events[1], events[3]]

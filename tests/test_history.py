import json
import re
from pathlib import Path

import matplotlib
import pytest

from config import InputError
from utils.history import HISTORY, History, above_growth, read, settled

ROOT = Path(__file__).parents[1]


def ticking(*seconds):
    return iter(seconds).__next__


def test_what_was_written_is_read_back_in_full(tmp_path):
    path = tmp_path / "history.jsonl"
    with History(path, ticking(5.0, 5.5, 7.25)) as history:
        history("run", config={"d_ff": 8, "out": Path("a/b")}, corpus="b\n\u2028ö", fallback=False)
        history("eval", valid_loss=1 / 3, expert_load=[[0.1, 0.9], [0.5, 0.5]])
    assert read(path) == [
        {
            "event": "run",
            "wall_s": 0.5,
            "config": {"d_ff": 8, "out": "a/b"},
            "corpus": "b\n\u2028ö",
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
    path = tmp_path / "history.jsonl"
    with History(path) as history:
        for step in range(3):
            history("step", step=step, loss=0.1)
            lines = path.read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
            assert all(line.startswith('{"event": "step", "wall_s": ') for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [[0.5, float("nan")]]])
def test_a_number_that_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    path = tmp_path / "history.jsonl"
    with History(path) as history:
        history("step", loss=1.0)
        with pytest.raises(ValueError, match="grad_norm"):
            history("step", loss=1.0, grad_norm=value)
    assert [event["event"] for event in read(path)] == ["step"]


def test_a_line_torn_anywhere_is_not_read_and_the_next_run_writes_over_it(tmp_path):
    path = tmp_path / "history.jsonl"
    whole = b'{"event": "run", "wall_s": 1.0}\n'
    torn = '{"event": "step", "wall_s": 2.0, "name": "ö"}'.encode()
    for length in range(len(torn) + 1):
        path.write_bytes(whole + torn[:length])
        assert [event["event"] for event in read(path)] == ["run"]
        with History(path) as history:
            history("end")
        assert [event["event"] for event in read(path)] == ["run", "end"]


@pytest.mark.parametrize("damage", [b'{"event": "st', b"", b"\0\0", b"\xff{}", b"3", b"{}"])
def test_any_other_damage_is_named_by_file_and_line(tmp_path, damage):
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"event": "run", "wall_s": 0}\n' + damage + b"\n")
    with pytest.raises(InputError, match=r"history\.jsonl, line 2"):
        read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        read(tmp_path / "absent.jsonl")


def test_time_goes_on_where_the_last_run_stopped(tmp_path):
    path = tmp_path / "history.jsonl"
    with History(path, ticking(100.0, 160.0)) as history:
        history("checkpoint")
    with History(path, ticking(7.0, 8.0)) as history:
        history("end")
    assert [event["wall_s"] for event in read(path)] == [60.0, 61.0]


@pytest.mark.parametrize("folder", sorted((ROOT / "docs").iterdir()), ids=lambda path: path.name)
def test_pandas_reads_a_column_for_each_field_and_the_readmes_lines_plot_them(folder, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    frame = pandas.read_json(folder / HISTORY, lines=True)
    events = read(folder / HISTORY)
    assert len(frame) == len(events) and set(frame) == set().union(*events)
    for name in ("wall_s", "tokens", "loss", "valid_loss", "lr", "grad_norm", "tokens_per_s"):
        assert frame[name].dtype == "float64", name
        told = [event[name] for event in events if name in event]
        assert frame[name].dropna().tolist() == pytest.approx(told, rel=1e-9)
    (lines,) = re.findall(
        r"```python\n(import pandas.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    monkeypatch.chdir(folder)
    made = {}
    exec(lines.replace("checkpoints/", ""), made)
    shown = [line.get_label() for line in made["axes"].get_lines()]
    assert shown == ["loss", "valid_loss"]
    assert all(len(line.get_xdata()) > 20 for line in made["axes"].get_lines())


def test_what_a_growth_cost_is_told_free_of_what_the_precision_of_training_makes_of_a_loss():
    """Evaluations in bf16 are off float32's by 0.01 here; the growth itself cost 0.3."""
    events = [
        {"event": "eval", "phase": 1, "step": 9, "valid_loss": 2.01},
        {"event": "grow", "phase": 2, "valid_loss_fp32": 2.0},
        {"event": "eval", "phase": 2, "step": 0, "valid_loss": 2.31, "valid_loss_fp32": 2.3},
        {"event": "eval", "phase": 2, "step": 10, "valid_loss": 2.2, "valid_loss_fp32": 2.195},
        {"event": "eval", "phase": 2, "step": 20, "valid_loss": 2.11},
        {"event": "eval", "phase": 3, "step": 0, "valid_loss": 2.11},
    ]
    found, losses = zip(*above_growth(events, 2), strict=True)
    assert list(losses) == pytest.approx([0.3, 0.195, 0.1]) and list(found) == events[2:5]
    assert settled(events, 2) == pytest.approx({0: 0.3, 10: 0.195})
    assert above_growth(events, 1) == above_growth(events, 3) == []

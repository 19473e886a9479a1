"""What a run says of itself: the header tells what is trained on, evaluated and left out."""

import re
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
import torch

from config import DataConfig, Deepen, Phase, TrainingConfig, Upcycle, Widen, full
from tests.helpers.small_runs import FOUR_PHASES, small_run
from transfer import FunctionDrift
from utils.data import prepare_corpus, valid_windows
from utils.metrics.console import (
    GROWTH_COLUMNS,
    GROWTH_LEGEND,
    bar_format,
    estimate_line,
    evaluation_share_line,
    growth_line,
    passes_lines,
    phase_row,
    progress_line,
    run_header,
    run_report,
    run_summary,
    time_line,
    underused_line,
)
from utils.runtime.formatting import LINE_WIDTH, format_table, wrap_lines
from utils.runtime.stopwatch import TIME_KINDS
from utils.schedule.phases import resolve_phases, resume_phases
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR


@pytest.fixture
def header(tmp_path):
    """Returns the header of a run on files with so many stories each, as one line; each of its
    lines, but for the table and paths, fits a terminal."""

    def header(files: dict[str, int], steps: int = 5, **config) -> str:
        stories = builtin_stories(sum(files.values()))
        for name, count in files.items():
            path = tmp_path / "text" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            encoding = "utf-16" if "utf16" in name else "utf-8"
            path.write_text(SEPARATOR.join(next(stories) for _ in range(count)), encoding)
        source, cache = str(tmp_path / "text"), Path(tmp_path, "cache")
        data = DataConfig(source, "learned", cache=cache, **config)
        corpus = prepare_corpus(data, 300)
        run = small_run(tmp_path, replace(FOUR_PHASES, steps_phase1=steps))
        run = replace(run, data=data)
        windows = valid_windows(corpus, 32, eval_tokens=320, final_eval_tokens=640)
        text = run_header(run, resolve_phases(run), corpus, windows, torch.device("cpu"))
        lines = text.partition("\n\n")[0].splitlines()
        assert all(len(line) <= 80 or str(tmp_path) in line for line in lines), text
        return " ".join(text.split())

    return header


def test_the_header_names_the_files_of_each_kind_and_those_left_out(header):
    text = header({"a.txt": 9, "b.txt": 9, "val.txt": 3, "test.txt": 3, "cover.png": 0})
    assert "text: 3 files, 21 documents, " in text
    assert "training text: a.txt, b.txt; validation text: val.txt " in text
    assert "left out, 2: test.txt (test text), cover.png (not text) " in text
    assert "320 tokens from 3 of the 3 validation documents each time, 640 from 3" in text
    assert "cut after" not in text


def test_the_header_tells_how_much_is_held_out_and_where_the_text_was_cut(header):
    text = header({f"{i}.txt": 5 for i in range(8)}, valid_fraction=0.2)
    share = "training text: 0.txt, 1.txt, 2.txt, 3.txt and 4 more; validation text: 8 of its 40 "
    assert share in text and "cut after" not in text
    text = header({}, num_stories=30, valid_fraction=0.2)
    assert "cut after 24 training and 6 validation stories (data.num_stories)" in text


def test_the_header_says_why_more_is_held_out_than_was_asked_for(header):
    text = header({"a.txt": 1, "b.txt": 1, "c.txt": 1}, valid_fraction=0.1)
    assert "1 of its 3 documents" in text
    assert "(data.valid_fraction = 0.1, but documents are kept whole)" in text


def test_the_header_of_a_single_document_and_of_another_encoding_says_so(header):
    text = header({"utf16.txt": 1, "b.jsonl": 0}, valid_fraction=0.3)
    assert "text: 1 file, 1 document, " in text and "validation text: the end of it" in text
    assert "read as UTF-16, 1: utf16.txt " in text


def test_the_header_tells_how_often_the_text_is_read_and_where_that_is_too_often(header):
    text = header({"a.txt": 9}, steps=200)
    tokens = {"dense": 25_600, "moe": 640, "wide": 256, "deep": 128}
    found = re.search(r"reads the training text (\S+) times: (.*?) MORE THAN 4 TIMES: ", text)
    assert found, text
    passes = dict(part.split() for part in found[2].split(", "))
    size = 25_600 / float(passes["dense"])
    assert passes.keys() == tokens.keys()
    assert [float(n) for n in passes.values()] == pytest.approx(
        [count / size for count in tokens.values()], rel=0.1
    )
    assert float(found[1]) == pytest.approx(sum(tokens.values()) / size, rel=0.1)
    assert "TIMES" not in header({})


def test_the_summary_has_a_dash_for_what_a_growth_left_without_a_finite_value():
    unmeasured = FunctionDrift(2.0, nan, nan, nan, nan, 0.0, 0, 0.0, 1.0, 64)
    grow = {"event": "grow", "phase": 2, "phase_name": "moe", "growth": "Upcycle"}
    row = run_report([grow | unmeasured.to_json()]).splitlines()[-1]
    assert row == "| Upcycle -> moe | 2.000000 | - | - | - | - | 0 of 64 | - |  |"


def test_the_header_of_a_resumed_run_tells_no_settings_of_what_is_done(tmp_path):
    run = small_run(tmp_path)
    phases = resume_phases(resolve_phases(run), number=2, step=1, first_token=640, tokens=768)
    done, *left = (phase_row(phase, run, torch.device("cpu")) for phase in phases)
    assert done[3:] == ("-", "done", "-", "-") and done[0] == "1 dense"
    assert [row[5] for row in left] == ["4 x 32", "2 x 32", "1 x 32"]
    whole, *parts = map(float, re.findall(r"[\d.]+(?=,| times|$)", passes_lines(phases, 100)[0]))
    assert len(parts) == 4 and sum(parts) == pytest.approx(whole, rel=0.05)


LONG = "a-name-of-20-letters"
DRIFT = FunctionDrift(10.864026, 10.864026, -1.4e-17, 2.5e-14, 0.0, 0.0, 12, 0.0, 1.0, 2048, 8.3e-6)


@pytest.fixture
def long_phases():
    """The largest phases of the full preset, with long names and five-digit steps."""
    growths = {"dense": None, "moe": Upcycle(), "wide": Widen(), "deep": Deepen()}
    steps = 65_536
    phases = {f"{LONG[:-5]}{n:_>5}": Phase(g, steps=steps, lr=2.5e-5) for n, g in growths.items()}
    assert {len(name) for name in phases} == {20}
    return replace(full(), phases=phases)


def is_narrow(text: str) -> bool:
    return max(map(len, text.splitlines())) <= LINE_WIDTH


def test_the_tables_of_a_run_fit_a_line_however_long_its_values_are(long_phases):
    phases = resolve_phases(
        replace(long_phases, model=replace(long_phases.model, vocab_size=50257))
    )
    assert (
        "1.15 B" in (rows := [phase_row(p, long_phases, torch.device("cpu")) for p in phases])[3][2]
    )
    assert is_narrow("\n".join(format_table(rows)))
    events = []
    for phase in phases:
        where = {"phase": phase.number, "phase_name": phase.name}
        events += [{"event": "grow", "growth": "Upcycle", **where, "valid_loss_fp32": 10.9}]
        events[-1] |= DRIFT.to_json()
        for step in (0, 10, 50, 200):
            losses = {"valid_loss": 9.9, "valid_loss_fp32": 9.9}
            events += [{"event": "eval", **where, "step": step, **losses}]
        sizes = {"params": phase.config.num_params, "active_params": phase.config.num_active_params}
        losses = {"loss": 10.123, "final_valid_loss": 10.123, "peak_memory_gb": 129.8}
        events += [
            {"event": "checkpoint", "trained": True, **where, **sizes, **losses}
            | {"phase_tokens": phase.tokens, "phase_s": 86_400.0}
        ]
    summary = run_summary(events)
    assert is_narrow(summary) and "310 M of 932 M" in summary and summary.count("-1.000") == 16


def test_every_line_of_a_run_fits_a_line_of_the_terminal(long_phases):
    phase = resolve_phases(long_phases)[-1]
    last = {"valid_loss": 10.123, "loss": 10.123, "tokens_per_s": 26_800.0}
    line = progress_line(phase, 65_535, last, 1.234)
    assert is_narrow(line) and "valid loss 10.123" in line and "train loss 10.123" in line
    assert phase.growth is not None
    underused = [(layer, 7) for layer in range(9)]
    for prose in (
        growth_line(phase, phase.growth, DRIFT),
        estimate_line([phase], [{"steps": 1e9, "evaluation": 1e8}]),
        evaluation_share_line([phase], [{"steps": 1.0, "evaluation": 99.0}]),
        time_line({kind: 12_345.6 for kind in TIME_KINDS}),
        underused_line(phase, underused, 0.01),
    ):
        assert is_narrow(wrap_lines(prose)), prose


def test_the_loss_on_the_probe_is_never_called_as_the_validation_loss_is(long_phases):
    phase = resolve_phases(long_phases)[-1]
    assert phase.growth is not None
    assert ": probe loss 10.86" in growth_line(phase, phase.growth, DRIFT)
    assert "loss" not in " ".join(GROWTH_COLUMNS) and "probe before" in GROWTH_COLUMNS


def test_the_legend_explains_every_column_of_the_table_of_growths():
    told = {name for line in GROWTH_LEGEND.splitlines() for name in line.split(":")[0].split(", ")}
    columns = {name.removeprefix("probe ") for name in GROWTH_COLUMNS[1:]}
    assert {name.removeprefix("probe ") for name in told} == columns | {"step N"}
    assert is_narrow(GROWTH_LEGEND)


def test_a_column_of_memory_is_there_only_where_memory_is_measured():
    event = {"event": "checkpoint", "trained": True, "phase": 1, "phase_name": "dense"}
    event |= {"params": 9, "active_params": 9, "phase_tokens": 9, "phase_s": 9.0}
    event |= {"loss": 2.0, "final_valid_loss": 2.0}
    assert "memory" not in run_summary([event])
    assert run_summary([event | {"peak_memory_gb": 0.02}]).endswith("20.0 MB")


def test_the_name_of_a_phase_may_have_braces(tmp_path):
    run = replace(small_run(tmp_path), training=TrainingConfig(), phases={"a{b}": Phase(steps=2)})
    (phase,) = resolve_phases(run)
    assert (
        bar_format(phase, 80)
        .format(postfix=", 00:01 left", n_fmt=1, total_fmt=2, bar="")
        .startswith("phase 1 (a{b}), 00:01 left")
    )


def test_a_phase_whose_evaluations_take_more_than_a_small_share_is_named(tmp_path):
    phases = resolve_phases(small_run(tmp_path))[:3]
    left = [{"steps": 96.9, "evaluation": 3.1}, {"steps": 97.1, "evaluation": 2.9}]
    left.append({"steps": 40.0, "evaluation": 50.0, "samples": 10.0})
    line = evaluation_share_line(phases, left)
    assert line.startswith("evaluations take about 3% of dense, 50% of wide; a higher --training.")
    assert evaluation_share_line(phases[1:2], left[1:2]) == ""


def test_the_estimate_counts_all_that_is_to_come_and_tells_each_phase(tmp_path):
    phases = resolve_phases(small_run(tmp_path))[2:]
    line = estimate_line(phases, [{"steps": 20.0, "saving": 5.0}, {"steps": 1.0, "start": 2.0}])
    assert line == "about 28 s to come (wide 25 s, deep 3 s)"


def test_the_summary_tells_what_the_time_was_spent_on_largest_part_first():
    spent = {"steps_s": 60.0, "start_s": 4.0, "saving_s": 0.1, "evaluation_s": 36.0}
    end = {"event": "end", "wall_s": 100.1, "tokens": 9, **spent}
    told = "100 s in all: steps 60 s (60%), evaluation 36 s (36%), start 4 s (4%)"
    assert run_summary([end]).endswith(f"\n\n{told}")
    assert "in all" not in run_summary([{"event": "end", "wall_s": 9.0, "tokens": 9}])

"""What a run says of itself: the header tells what is trained on, evaluated and left out."""

from math import nan
from pathlib import Path

import pytest
import torch

from config import DataConfig
from tests.helpers.small_runs import small_run
from transfer import FunctionDrift
from utils.data import prepare_corpus, valid_windows
from utils.metrics.console import phase_row, run_header, run_summary
from utils.schedule.phases import resolve_phases, resume_phases
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR


@pytest.fixture
def header(tmp_path):
    """Returns the header of a run on files with so many stories each."""

    def header(files: dict[str, int], **config) -> str:
        stories = builtin_stories(sum(files.values()))
        for name, count in files.items():
            path = tmp_path / "text" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(SEPARATOR.join(next(stories) for _ in range(count)))
        source, cache = str(tmp_path / "text"), Path(tmp_path, "cache")
        corpus = prepare_corpus(DataConfig(source, "learned", cache=cache, **config), 300)
        run = small_run(tmp_path)
        windows = valid_windows(corpus, 32, eval_tokens=320, final_eval_tokens=640)
        return run_header(run, resolve_phases(run), corpus, windows, torch.device("cpu"))

    return header


def test_the_header_names_the_files_of_each_kind_and_those_left_out(header):
    text = header({"a.txt": 9, "b.txt": 9, "val.txt": 3, "test.txt": 3, "cover.png": 0})
    assert "training text: a.txt, b.txt; validation text: val.txt\n" in text
    assert "left out, 2: test.txt (test text), cover.png (not text)\n" in text
    assert "320 tokens from 3 of the 3 validation documents each time, 640 from 3" in text
    assert "cut after" not in text


def test_the_header_tells_how_much_is_held_out_and_where_the_text_was_cut(header):
    text = header({f"{i}.txt": 5 for i in range(8)}, valid_fraction=0.2)
    share = "training text: 0.txt, 1.txt, 2.txt, 3.txt and 4 more; validation text: 8 of its 40 "
    assert share in text and "cut after" not in text
    text = header({}, num_stories=30, valid_fraction=0.2)
    assert "cut after 24 training and 6 validation stories (data.num_stories)" in text


def test_the_summary_has_a_dash_for_what_a_growth_left_without_a_finite_value():
    unmeasured = FunctionDrift(2.0, nan, nan, nan, nan, 0.0, 0, 0.0, 1.0, 64)
    grow = {"event": "grow", "phase": 2, "phase_name": "moe", "growth": "Upcycle"}
    row = run_summary([grow | unmeasured.to_json()]).splitlines()[-1]
    assert " ".join(row.split()) == "Upcycle -> moe 2.000000 - - - - 0 of 64 -"


def test_the_header_of_a_resumed_run_tells_no_settings_of_what_is_done(tmp_path):
    run = small_run(tmp_path)
    phases = resume_phases(resolve_phases(run), number=2, step=1, first_token=640, tokens=768)
    done, *left = (phase_row(phase, run, torch.device("cpu")) for phase in phases)
    assert done[3:] == ("done", "-", "-", "-") and done[0] == "1 dense"
    assert [row[4] for row in left] == ["4 x 32", "2 x 32", "1 x 32"]

"""What an experiment claims, and the tables of what is kept of runs."""

import json
from math import isnan, sqrt
from pathlib import Path

import numpy as np
import pytest

from config import InputError
from utils.experiment.records import keep_experiment, keep_run, print_report, report_of
from utils.experiment.report import format_report
from utils.experiment.significance import chance_margin, residual_std, studentized_range
from utils.metrics.history import HISTORY_FILE, read_history, select_events, write_history
from utils.runtime.formatting import format_markdown_table

ROOT = Path(__file__).parents[2]
TRIALS = 1000


def make_history(end_loss, seed, loss_after_growth=2.25):
    where = {"phase": 2, "phase_name": "moe"}
    after = {"step": 0, "valid_loss": 9.0, "valid_loss_fp32": loss_after_growth}
    losses = {"valid_loss": 8.0 - end_loss, "final_valid_loss": float(end_loss)}
    end = {"step": 9, **losses, "copy_distance": 0.1, "expert_load": [[1.0]]}
    events = [
        {"event": "run", "seed": seed},
        {"event": "grow", **where, "valid_loss_fp32": 2.0},
        {"event": "eval", **where, **after},
        {"event": "step", **where, "step": 9, "loss": 1.0},
        {"event": "eval", **where, **end},
        {"event": "end"},
    ]
    return [event | {"wall_s": float(i)} for i, event in enumerate(events)]


def make_histories(ends_VS):
    return {
        f"v{number}": [make_history(end, seed) for seed, end in enumerate(ends)]
        for number, ends in enumerate(ends_VS)
    }


def draw_experiments(seeds, effects=(0.0,) * 6):
    """Losses (trials, variants, seeds) that differ by their variant, their seed and chance, with a
    standard deviation of 1."""
    rng = np.random.default_rng(seeds)
    shape = TRIALS, len(effects), seeds
    by_seed = 3 * rng.standard_normal((TRIALS, 1, seeds))
    return 4.0 + np.array(effects)[:, None] + by_seed + rng.standard_normal(shape)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_identical_variants_are_within_the_margin_in_95_of_100_experiments(seeds):
    outside = [
        np.ptp(losses_VS.mean(1)) > chance_margin(losses_VS)
        for losses_VS in draw_experiments(seeds)
    ]
    deviation = sqrt(0.05 * 0.95 / TRIALS)
    assert np.mean(outside) == pytest.approx(0.05, abs=3 * deviation)


def test_five_seeds_find_a_difference_of_three_standard_deviations():
    one_worse = (0.0, 0.0, 0.0, 0.0, 0.0, 3.0)
    found = [
        losses_VS.mean(1)[-1] - losses_VS.mean(1).min() > chance_margin(losses_VS)
        for losses_VS in draw_experiments(5, one_worse)
    ]
    assert np.mean(found) > 0.95


def test_the_quantiles_are_those_of_published_tables():
    for variants, degrees, published in (
        (2, 4, 3.926),
        (3, 8, 4.041),
        (6, 5, 6.033),
        (6, 20, 4.445),
    ):
        assert studentized_range(variants, degrees) == pytest.approx(published, rel=5e-3)


def test_what_a_seed_adds_to_every_variant_is_no_reason_to_doubt_a_difference():
    losses_VS = draw_experiments(5)[0]
    moved = losses_VS + [0.0, 100.0, -50.0, 3.0, 7.0] + np.arange(6.0)[:, None]
    assert residual_std(moved) == pytest.approx(residual_std(losses_VS))
    assert isnan(chance_margin(losses_VS[:, :1])) and isnan(chance_margin(losses_VS[:1]))


def test_a_variant_is_worse_if_it_is_further_from_the_best_than_chance_explains():
    residuals = 0.01 * np.array([[1, -1, 0, 1, -1], [-1, 1, 0, -1, 1], [0, 0, 0, 0, 0]])
    losses_VS = 4.0 + residuals + np.array([[0.0], [0.015], [0.03]])
    margin = 4.041 * residual_std(losses_VS) / sqrt(5)
    assert 0.015 < margin < 0.03
    report = format_report(make_histories(losses_VS), format_markdown_table)
    lines = report.replace("|", " ").splitlines()
    first, second, third = (line.split()[1:] for line in lines[2:5])
    assert first[:3] == ["4.0000", "-", "best"]
    assert second[:5] == ["4.0150", "+0.0150", "±", f"{chance_margin(losses_VS):.4f}", "tie"]
    assert third[4] == "worse" and third[5:] == ["0.100", "-", "-", "5"]
    assert "5 seeds a variant" in lines[6] and "8 degrees of freedom" in lines[6]
    assert lines[-2].split() == ["v2", "+0.2500"]
    assert lines[-1].split() == ["±", "by", "chance", "0.0000"]


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_fewer_than_five_seeds_claim_nothing(seeds):
    losses_VS = np.array([[1.0], [2.0]]) + 1e-6 * np.arange(seeds) ** 2 * [[1], [-1]]
    report = format_report(make_histories(losses_VS))
    assert "No claim is made: a claim takes 5 seeds." in report
    assert "worse" not in report and "tie" not in report
    assert ("±" in report.splitlines()[2]) == (seeds > 1), (
        "the interval is shown where there is one"
    )


def test_one_variant_alone_is_compared_with_none():
    report = format_report(make_histories(np.ones((1, 5))))
    assert "One variant has none to be compared with." in report and "best" in report


def test_what_is_kept_of_an_experiment_gives_the_tables_that_it_printed(tmp_path, capsys):
    histories = make_histories(draw_experiments(5)[0])
    file = tmp_path / "noise.jsonl"
    keep_experiment(file, "noise", histories)
    kept, printed = report_of(file), format_report(histories)
    assert kept == format_report(histories, format_markdown_table)
    assert set(kept.split()) - {"|", "---"} == set(printed.split())
    print_report((file, file))
    assert capsys.readouterr().out == f"{kept}\n\n{kept}\n"
    runs = select_events(read_history(file), "run")
    assert {run["thinned"] for run in runs} == {"no step lines, without expert_load"}
    assert [run["variant"] for run in runs[::5]] == list(histories)
    kinds = {event["event"] for event in read_history(file)}
    assert kinds == {"run", "grow", "eval", "end"}
    assert not [event for event in read_history(file) if "expert_load" in event]


def test_variants_of_other_seeds_are_not_compared(tmp_path):
    histories = make_histories(np.ones((2, 5)))
    histories["v1"].pop()
    keep_experiment(tmp_path / "noise.jsonl", "noise", histories)
    with pytest.raises(
        InputError, match=r"the variants differ in their seeds .*'v1': \[0, 1, 2, 3\]"
    ):
        report_of(tmp_path / "noise.jsonl")


def test_a_thinned_history_is_what_the_run_wrote_and_says_what_is_missing(tmp_path):
    run, *others = read_history(ROOT / "docs" / "books" / HISTORY_FILE)
    run.pop("thinned", None)
    write_history(tmp_path / HISTORY_FILE, [run, *others])
    file = tmp_path / "kept.jsonl"
    keep_run(tmp_path, file, step_every=4, drop=("router_entropy",))
    kept_run, *kept = read_history(file)
    assert kept_run == run | {"thinned": "1 of 4 step lines, without router_entropy"}
    steps = select_events(others, "step")[3::4]
    expected = [event for event in others if event["event"] != "step" or event in steps]
    assert kept == [{k: v for k, v in e.items() if k != "router_entropy"} for e in expected]
    with pytest.raises(InputError, match=r"kept\.jsonl is there: --overwrite replaces it"):
        keep_run(tmp_path, file)
    with pytest.raises(InputError, match="is the history itself"):
        keep_run(tmp_path, tmp_path / HISTORY_FILE, overwrite=True)
    keep_run(tmp_path, file, overwrite=True)
    assert read_history(file) == [run | {"thinned": "1 of 1 step lines"}, *others]
    assert report_of(file) == report_of(tmp_path / HISTORY_FILE)
    assert report_of(file).count("| Widen -> wide | ") == 1
    file.rename(tmp_path / HISTORY_FILE)
    with pytest.raises(InputError, match="was thinned before: 1 of 1 step lines"):
        keep_run(tmp_path, file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no run"),
        ('{"event": "run", "wall_s": 0}\n' * 2, "holds 2 runs of no experiment"),
        ('{"event": "end", "wall_s": 0}\n', "holds no run"),
    ],
)
def test_a_file_that_holds_nothing_to_tabulate_is_named(tmp_path, text, message):
    (tmp_path / "other.jsonl").write_text(text)
    with pytest.raises(InputError, match=rf"other\.jsonl {message}"):
        report_of(tmp_path / "other.jsonl")


@pytest.mark.parametrize("name", ["expert_lode", "event", "step"])
def test_only_a_field_that_is_there_and_can_be_missed_is_left_out(tmp_path, name):
    write_history(tmp_path / HISTORY_FILE, make_history(1.0, seed=0))
    with pytest.raises(InputError, match=f"drop = {name} is no field that can be left out"):
        keep_run(tmp_path, tmp_path / "kept.jsonl", drop=("expert_load", name))


def test_a_history_without_its_run_line_cannot_be_kept(tmp_path):
    line = {"event": "step", "wall_s": 0.0}
    (tmp_path / HISTORY_FILE).write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="does not begin with its run"):
        keep_run(tmp_path, tmp_path / "kept.jsonl")

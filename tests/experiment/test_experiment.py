"""The variants of an experiment, on a model of 27 thousand parameters."""

from dataclasses import replace
from itertools import pairwise

import pytest

from config import PRESETS, InputError, Phase, TrainingConfig, tiny
from tests.helpers.small_runs import assert_times_add_up, small_run
from utils.experiment.records import report_of
from utils.experiment.runner import run_experiment
from utils.experiment.variants import EXPERIMENTS, Experiment, parse_experiment
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.runtime.formatting import LINE_WIDTH

STEPS = {f"steps_phase{i}": 2 for i in range(1, 5)}
TRAINING = replace(tiny().training, **STEPS, log_every=1, eval_tokens=300, sample_tokens=0)


@pytest.fixture
def small(tmp_path):
    run = small_run(tmp_path, TRAINING)
    return replace(run, data=replace(run.data, num_stories=100))


def test_variants_start_from_one_model_and_a_finished_one_is_not_trained_again(small, capsys):
    experiment = Experiment("upcycle", seeds=2, run=small)
    run_experiment(experiment)
    printed = capsys.readouterr().out
    assert all(f"\n{variant}" in printed for variant in EXPERIMENTS["upcycle"].growth)
    histories = [
        read_history(run.out / HISTORY_FILE)
        for runs in experiment.variant_runs().values()
        for run in runs
    ]
    for events in histories:
        assert_times_add_up(events)
    before = {select_events(events, "grow")[0]["valid_loss_fp32"] for events in histories}
    assert len(before) == 1, "one checkpoint, which no variant has changed"
    ends = {select_events(events, "eval")[-1]["final_valid_loss"] for events in histories}
    assert len(ends) == 8, "variants and seeds differ"
    kept = set(report_of(small.out / "upcycle.jsonl").split()) - {"|", "---"}
    assert kept <= set(printed.split())
    assert max(map(len, printed[printed.index("\nvariant") :].splitlines()[:-1])) <= LINE_WIDTH

    def trained_again(run, **choice):
        run_experiment(replace(experiment, run=run, **choice))
        printed = capsys.readouterr().out
        return printed.count("moe) 2/2") + printed.count("moe) 3/3")

    assert trained_again(small) == 0
    stopped = experiment.variant_runs()["router-3"][1].out / HISTORY_FILE
    stopped.write_bytes(b"".join(stopped.read_bytes().splitlines(keepends=True)[:-1]))
    assert trained_again(small) == 1, "it was stopped before its end"
    moved = replace(small, data=replace(small.data, cache=small.out.parent / "elsewhere"))
    assert trained_again(moved) == 0, "wherever its tokens lie"
    by_ones = replace(small, training=replace(TRAINING, micro_batch_size=1))
    assert trained_again(by_ones, variants=("copies",)) == 2, "it would come out otherwise"
    longer = replace(small, training=replace(TRAINING, steps_phase2=3))
    assert trained_again(longer) == 8, "its settings have changed"


def test_what_variants_share_must_have_been_made_with_the_same_settings(small):
    run_experiment(Experiment("lr", seeds=1, run=small))
    other = replace(small, training=replace(TRAINING, lr_phase1=1e-5))
    with pytest.raises(InputError, match=r"holds another run: phases\.dense\.lr was 0\.005"):
        run_experiment(Experiment("lr", seeds=1, run=other))
    other = replace(small, training=replace(TRAINING, weight_decay=0.5))
    with pytest.raises(InputError, match=r"another run: training\.weight_decay was 0\.01, is 0\.5"):
        run_experiment(Experiment("lr", seeds=1, run=other))


def test_an_experiment_does_not_touch_the_run_in_its_folder(small):
    small.out.mkdir()
    (small.out / HISTORY_FILE).write_text('{"event": "run", "wall_s": 0}\n')
    run_experiment(Experiment("lr", seeds=1, run=small))
    assert read_history(small.out / HISTORY_FILE) == [{"event": "run", "wall_s": 0}]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_variants_differ_in_what_they_are_named_after_and_nowhere_else(name):
    run = replace(tiny(), training=TrainingConfig(lr_scaling="none", weight_decay=0.03))
    runs = Experiment(name, seeds=3, run=run).variant_runs()
    assert len(runs) > 1 and all(len(seeded) == 3 for seeded in runs.values())
    for seeded in runs.values():
        assert [each.seed for each in seeded] == [0, 1, 2]
        assert {each.training.weight_decay for each in seeded} == {0.03}
        assert len({each.out for each in seeded}) == 3
    first = [(each[0].training, each[0].phases) for each in runs.values()]
    assert all(one != other for one, other in pairwise(first))


def test_placements_that_come_to_the_same_growth_are_one_variant():
    depth = {
        name: list(Experiment("depth", run=PRESETS[name]()).variant_runs())
        for name in ("full", "tiny")
    }
    assert depth["full"] == EXPERIMENTS["depth"].names
    placements = ("interleaved", "middle")  # tiny has one new block: at the end or in the middle
    assert depth["tiny"] == [f"{init}-{p}" for init in ("identity", "copy") for p in placements]
    alone = Experiment("depth", variants=("copy-end",), run=tiny()).variant_runs()
    assert list(alone) == ["copy-end"]


def test_the_run_as_it_stands_is_a_variant_of_several_experiments_and_trained_for_all(small):
    folders = [
        {runs[0].out for runs in Experiment(name, run=small).variant_runs().values()}
        for name in ("noise", "optimizer", "lr")
    ]
    assert folders[0] & folders[1] & folders[2] == {small.out / "wide-as-it-is-seed0"}
    assert len(folders[0] | folders[1] | folders[2]) == 5 + 3 + 2 - 2
    alone = Experiment("optimizer", variants=("reset",), run=small).variant_runs()
    assert list(alone) == ["reset"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["noize"], "there is no experiment noize"),
        (["noise", "huge"], "there is no preset huge"),
        (["noise", "tiny", "--seeds", "0"], "seeds = 0"),
        (["noise", "tiny", "--variants", "loud"], "variants = loud is not in noise, only noise-0,"),
        (["noise", "tiny", "--phase", "wyde"], "phase = wyde is not in the schedule"),
        (["noise", "tiny", "--phase", "dense"], "phase = dense does not grow"),
        (["depth", "tiny", "--phase", "wide"], "grows by Widen, which has no init, placement"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(args, message):
    with pytest.raises(InputError, match=message):
        parse_experiment(args)


def test_arguments_that_are_left_out_are_those_of_the_preset():
    assert parse_experiment(["lr", "tiny"]) == Experiment("lr", run=tiny())


def test_the_trunk_ends_before_the_growth_and_decays_to_the_rate_after_it():
    trunk = Experiment("depth", run=tiny()).trunk_run()
    assert list(trunk.phases) == ["dense", "moe", "wide", "deep"]
    assert trunk.phases["deep"] == Phase(steps=1, lr=tiny().training.lr_phase4)
    assert trunk.out == tiny().out / "before-deep"

"""Arms of an experiment, on a model of 27 thousand parameters."""

from dataclasses import replace
from itertools import pairwise

import pytest

from config import PRESETS, DataConfig, InputError, Phase, TrainingConfig, tiny
from utils.arms import report
from utils.experiment import EXPERIMENTS, Experiment, main, parse
from utils.history import read, select

STEPS = {f"steps_phase{i}": 2 for i in range(1, 5)}
TRAINING = replace(tiny().training, **STEPS, log_every=1, eval_tokens=300, sample_tokens=0)
MODEL = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=32)


@pytest.fixture
def small(tmp_path):
    data = DataConfig("builtin", num_stories=100, cache=tmp_path / "cache")
    return replace(
        tiny(), model=MODEL, training=TRAINING, data=data, out=tmp_path / "out", device="cpu"
    )


def test_every_arm_starts_from_the_same_model_and_is_trained_once(small, capsys):
    options = Experiment("upcycle", seeds=2, run=small)
    main(options)
    said = capsys.readouterr().out
    assert all(f"\n{arm}" in said for arm in EXPERIMENTS["upcycle"].growth)
    runs = {
        arm: [read(r.out / "training_history.jsonl") for r in rs]
        for arm, rs in options.runs().items()
    }
    grown = {arm: [select(events, "grow")[0] for events in each] for arm, each in runs.items()}
    before = {event["valid_loss_fp32"] for each in grown.values() for event in each}
    assert len(before) == 1, "one checkpoint, which no arm has changed"
    ends = {select(events, "eval")[-1]["valid_loss"] for each in runs.values() for events in each}
    assert len(ends) == 8, "arms and seeds differ"
    main(options)
    assert "step 2/2" not in capsys.readouterr().out, "what is finished is not run again"
    moved = replace(small, data=replace(small.data, cache=small.out.parent / "elsewhere"))
    main(replace(options, run=moved))
    assert "step 2/2" not in capsys.readouterr().out, "wherever its tokens lie"
    fewer = replace(small, training=replace(TRAINING, micro_batch_size=1))
    main(replace(options, run=fewer, arms=("copies",)))
    assert capsys.readouterr().out.count("moe) step 2/2") == 2, "unless it would come out otherwise"
    assert "router" not in capsys.readouterr().out
    main(replace(options, run=replace(small, training=replace(TRAINING, steps_phase2=3))))
    assert capsys.readouterr().out.count("moe) step 3/3") == 8, "unless its settings have changed"


def test_what_all_share_must_have_been_made_with_the_same_settings(small):
    main(Experiment("lr", seeds=1, run=small))
    other = replace(small, training=replace(TRAINING, lr_phase1=1e-5))
    with pytest.raises(InputError, match=r"holds another run: phases\.dense\.lr was 0\.005"):
        main(Experiment("lr", seeds=1, run=other))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_arms_differ_in_what_they_are_named_after_and_nowhere_else(name):
    run = replace(tiny(), training=TrainingConfig(lr_scaling="same", weight_decay=0.03))
    arms = Experiment(name, seeds=3, run=run).runs()
    assert len(arms) > 1 and all(len(seeds) == 3 for seeds in arms.values())
    for seeds in arms.values():
        assert [each.seed for each in seeds] == [0, 1, 2]
        assert {each.training.weight_decay for each in seeds} == {0.03}
        assert len({each.out for each in seeds}) == 3
    first = [(each[0].training, each[0].phases) for each in arms.values()]
    assert all(one != other for one, other in pairwise(first))


def test_places_that_come_to_the_same_growth_are_one_arm():
    depth = {name: list(Experiment("depth", run=PRESETS[name]()).runs()) for name in PRESETS}
    assert depth["full"] == EXPERIMENTS["depth"].names
    places = ("interleaved", "middle")  # the one new block of tiny goes to the end or the middle
    assert depth["tiny"] == [f"{init}-{where}" for init in ("identity", "copy") for where in places]
    alone = Experiment("depth", arms=("copy-end",), run=tiny()).runs()
    assert list(alone) == ["copy-end"]


def test_the_run_as_it_stands_is_an_arm_of_several_experiments_and_trained_for_all(small):
    folders = [
        {runs[0].out for runs in Experiment(name, run=small).runs().values()}
        for name in ("noise", "optimizer", "lr")
    ]
    assert folders[0] & folders[1] & folders[2] == {small.out / "wide-as-it-is-seed0"}
    assert len(folders[0] | folders[1] | folders[2]) == 5 + 3 + 2 - 2
    carry = Experiment("optimizer", arms=("reset",), run=small).runs()
    assert list(carry) == ["reset"]


def test_differences_without_one_sign_or_within_their_own_spread_are_ties():
    def history(loss, later):
        there = {"phase": 2, "phase_name": "moe"}
        return [
            {"event": "grow", **there, "valid_loss_fp32": 2.0},
            {"event": "eval", **there, "step": 0, "valid_loss": 9.0, "valid_loss_fp32": later},
            {"event": "eval", **there, "step": 9, "valid_loss": loss, "twin_distance": 0.1},
            {"event": "end", "wall_s": 3.0},
        ]

    arms = {"a": (1.0, 1.2), "b": (1.1, 1.2), "c": (1.5, 1.5), "d": (1.001, 1.7)}
    text = report({arm: [history(x, 2.25) for x in losses] for arm, losses in arms.items()})
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[:5]}
    assert [rows[arm][2] for arm in arms] == ["best", "tie", "+0.4000", "tie"]
    assert rows["a"] == ["1.1000", "0.2000", "best", "0.100", "-", "-", "3"]
    assert text.splitlines()[-1].split() == ["d", "+0.2500"]
    assert "one seed" not in text
    text = report({arm: [history(losses[0], 2.25)] for arm, losses in arms.items()})
    assert "one seed an arm: chance alone" in text
    assert text.splitlines()[2].split()[:4] == ["b", "1.1000", "-", "+0.1000"]


@pytest.mark.parametrize(
    "args, says",
    [
        (["noize"], "there is no experiment noize"),
        (["noise", "huge"], "there is no preset huge"),
        (["noise", "tiny", "--seeds", "0"], "seeds = 0"),
        (["noise", "tiny", "--arms", "loud"], "arms = loud is not in noise, only noise-0, "),
        (["noise", "tiny", "--phase", "wyde"], "phase = wyde is not in the schedule"),
        (["noise", "tiny", "--phase", "dense"], "phase = dense does not grow"),
        (["depth", "tiny", "--phase", "wide"], "grows by Widen, which has no init, where"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(args, says):
    with pytest.raises(InputError, match=says):
        parse(args)
    assert parse(["lr", "tiny"]).run == tiny()


def test_the_trunk_ends_before_the_growth_and_knows_what_rate_it_leads_to():
    trunk = Experiment("depth", run=tiny()).trunk()
    assert list(trunk.phases) == ["dense", "moe", "wide", "deep"]
    assert trunk.phases["deep"] == Phase(steps=1, lr=tiny().training.lr_phase4)
    assert trunk.out == tiny().out / "before-deep"

"""Whole runs, from the call to the files, on a model of 27 thousand parameters."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from config import Deepen, InputError, Phase, TrainingConfig, Upcycle, Widen, tiny
from train import main
from transfer.verify_growth_mechanics import compare_checkpoints
from utils.checkpoint import load
from utils.cli import run_command
from utils.errors import RunStopped
from utils.history import read, select
from utils.lab import PROMPTS
from utils.optimizer import wake
from utils.plot import figure
from utils.resume import Keeper

SCRIPT = Path(__file__).parent.parent / "transfer" / "verify_growth_mechanics.py"
MODEL = replace(tiny().model, vocab_size=300, d_model=32, n_layers=2, d_ff=48, seq_len=32)
BRIEF = TrainingConfig(log_every=2, eval_every=3, eval_tokens=400, sample_tokens=6)
STEPS = {f"steps_phase{i}": steps for i, steps in enumerate((5, 5, 4, 4), 1)}
FOUR = replace(BRIEF, **STEPS, batch_size=4, upcycle=Upcycle(4), deepen=Deepen(2))
GROWTH = (FOUR.upcycle, FOUR.widen, FOUR.deepen)
MODELS = ["dense_model", "moe_model_init", "moe_model_final", "medium_moe_final", "large_moe_final"]
HISTORY = "training_history.jsonl"
FIELDS = {
    "run": "config seed corpus fallback fingerprint device dtype params active_params commit",
    "step": "step tokens lr loss balance_loss z_loss grad_norm tokens_per_s",
    "eval": "step tokens valid_loss",
    "grow": "how tokens loss_before loss_after loss_drift max_logit_diff kl flipped growth_s",
    "checkpoint": "path trained",
    "end": "tokens",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    data = replace(tiny().data, num_stories=200, cache=folder / "cache")
    return replace(tiny(), model=MODEL, training=FOUR, data=data, out=folder / "run", device="cpu")


@pytest.fixture(scope="module")
def finished(small):
    main(small)
    return small.out


@pytest.fixture
def own(small, tmp_path):
    """Carries out a schedule of its own, in float32 on any CPU: the history, and each phase's
    checkpoint."""
    small = replace(small, device="cpu", precision="fp32")

    def own(training=BRIEF, model=MODEL, **phases):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run = replace(small, model=model, training=training, phases=phases, out=out)
        main(run)
        return read(out / HISTORY), [load(out / f"{name}_final.pt") for name in phases]

    return own


def equal(one, other):
    return all(torch.equal(one.weights[name], weight) for name, weight in other.weights.items())


def reproducible(folder):
    """The history but for timings and for what it was told of the folder."""
    events = read(folder / HISTORY)
    events[0]["config"] |= {"out": None, "overwrite": None}
    return [{k: v for k, v in event.items() if not k.endswith("_s")} for event in events]


def test_a_run_leaves_the_files_that_others_rely_on(finished):
    files = [f"{name}.pt" for name in MODELS] + [HISTORY, "training_curves.png"]
    assert {path.name for path in finished.iterdir()} == set(files)
    assert (finished / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    saved = [load(finished / f"{name}.pt") for name in MODELS]
    assert [checkpoint.tokens for checkpoint in saved] == [640, 640, 1280, 1536, 1664]
    assert [checkpoint.growth for checkpoint in saved] == [GROWTH[:i] for i in (0, 1, 1, 2, 3)]
    params = [sum(p.numel() for p in file.state.model().parameters()) for file in saved]
    assert [params[0], *params[2:]] == read(finished / HISTORY)[0]["params"]


def test_the_history_tells_all_in_order_and_holds_no_nan(finished):
    lines = (finished / HISTORY).read_text().splitlines()
    events = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert {event["event"] for event in events} == FIELDS.keys()
    assert all(set(FIELDS[event["event"]].split()) <= event.keys() for event in events)
    assert [event["event"] for event in (events[0], events[-1])] == ["run", "end"]
    named = [(event["phase"], event["phase_name"]) for event in events[1:-1]]
    assert list(dict.fromkeys(named)) == list(enumerate(("dense", "moe", "wide", "deep"), 1))
    times, tokens = ([e[k] for e in events if k in e] for k in ("wall_s", "tokens"))
    assert times == sorted(times) and tokens == sorted(tokens) and tokens[-1] == 1664
    assert [e["step"] for e in select(events, "eval")] == [0, 3, 5] * 2 + [0, 3, 4] * 2


def test_no_growth_moves_the_model_and_training_goes_on_where_it_was(finished):
    events = read(finished / HISTORY)
    for event, how in zip(select(events, "grow"), GROWTH, strict=True):
        assert event["how"] == type(how).__name__
        assert event["max_logit_diff"] <= how.limits.logit
        assert abs(event["loss_drift"]) <= how.limits.loss
    for before, after in pairwise(select(events, "eval")):
        if after["step"] == 0:
            assert after["valid_loss"] == pytest.approx(before["valid_loss"], abs=1e-4)


def test_the_loss_in_float32_goes_on_from_where_growing_found_it(finished):
    events = read(finished / HISTORY)
    before = {event["phase"]: event["valid_loss_fp32"] for event in select(events, "grow")}
    settling = [e for e in select(events, "eval") if "valid_loss_fp32" in e]
    assert [(e["phase"], e["step"]) for e in settling] == [(2, 0), (3, 0), (4, 0)]
    for event in settling:
        assert event["valid_loss_fp32"] == pytest.approx(before[event["phase"]], abs=1e-5)
        assert event["above_growth"] == event["valid_loss_fp32"] - before[event["phase"]]
    off = {event["phase"]: event["valid_loss"] - event["valid_loss_fp32"] for event in settling}
    for event in (e for e in select(events, "eval") if e["phase"] > 1 and e not in settling):
        want = event["valid_loss"] - off[event["phase"]] - before[event["phase"]]
        assert event["above_growth"] == pytest.approx(want) != 0
    assert all("above_growth" not in e for e in select(events, "eval") if e["phase"] == 1)


def test_the_jump_of_a_growth_that_is_not_exact_is_told_and_drawn(own, capsys):
    how, rare = Upcycle(4, redrawn=0.9), replace(BRIEF, eval_every=100)
    events, _ = own(rare, dense=Phase(steps=150, batch_size=16, lr=1e-2), moe=Phase(how, steps=4))
    grow, start = select(events, "grow")[0], select(events, "eval")[-2]
    jump = start["valid_loss"] - grow["valid_loss_fp32"]
    assert start["step"] == 0 and start["above_growth"] == jump > 0.02
    said = capsys.readouterr().out
    assert "Upcycle changed the function, which may move by 2 nats: loss" in said
    assert f"({jump:.3f} above what it was before the growth)" in said
    panel = figure({"run": events}).axes[1]
    assert any(line.get_ydata()[0] == jump for line in panel.lines)
    assert panel.texts[0].get_text().startswith(f"{jump:+.3f} at worst")


def test_evaluations_say_whether_the_new_capacity_is_used(finished):
    evals = select(read(finished / HISTORY), "eval")
    assert all(("twin_distance" in e) == (e["phase"] > 2) for e in evals)
    routed = [e for e in evals if e["phase"] > 1]
    for event in routed:
        assert 0 <= event["dropped_experts"] <= 1 and event["top_k_margin"] >= 0
        assert 0 < event["router_entropy"] < 1.3863
    divergence = [e["expert_divergence"] for e in routed]
    assert divergence[0] < 1e-6 < divergence[1] and len(divergence) == len(routed)


def test_a_phase_that_grew_is_evaluated_soon_after_whatever_the_rest(own):
    long = replace(BRIEF, eval_every=1000)
    events, _ = own(long, dense=Phase(steps=1), wide=Phase(Widen(2), steps=201))
    steps = [(e["phase"], e["step"]) for e in select(events, "eval")]
    assert steps == [(1, 0), (1, 1), (2, 0), (2, 10), (2, 50), (2, 200), (2, 201)]
    marked = [e["step"] for e in select(events, "eval") if "valid_loss_fp32" in e]
    assert marked == [0, 10, 50, 200]


def test_an_expert_that_starves_says_so(own, capsys):
    events, _ = own(BRIEF, dense=Phase(steps=0), moe=Phase(Upcycle(64, 1), steps=0))
    assert (
        "STARVING, under a tenth of a fair share of the tokens: expert" in capsys.readouterr().out
    )
    event = select(events, "eval")[-1]
    shares = [share for layer in event["expert_load"] for share in layer]
    starved = sum(share < 0.1 / 64 for share in shares)
    assert starved and event["dropped_experts"] == starved / len(shares)


@pytest.mark.parametrize("at_growth", ["carry", "reset", "reset-warmup"])
def test_adam_remembers_or_forgets_at_a_growth_as_it_is_told(own, monkeypatch, at_growth):
    woken = []

    def spy(state, *rest):
        woken.append(len(state.adam))
        return wake(state, *rest)

    monkeypatch.setattr("train.wake", spy)
    settings = replace(BRIEF, at_growth=at_growth, warmup=0.5, log_every=1)
    phases = {"dense": Phase(steps=2), "wide": Phase(Widen(2), steps=4), "more": Phase(steps=1)}
    events, _ = own(settings, **phases)
    assert [bool(kept) for kept in woken] == [False, at_growth == "carry", True]
    first = next(e["lr"] for e in select(events, "step") if e["phase"] == 2)
    assert first == pytest.approx(3e-4 if at_growth == "reset" else 1.5e-4)


def test_every_phase_ends_with_a_story_for_each_prompt(finished):
    trained = [event for event in read(finished / HISTORY) if event.get("trained")]
    told = [text for event in trained for text in event["samples"]]
    for text, prompt in zip(told, 4 * PROMPTS, strict=True):
        assert text.startswith(prompt) and text != prompt


def test_the_seed_decides_everything_and_overwrite_runs_anew(small, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match="a finished run: --overwrite"):
        main(replace(small, out=tmp_path))
    paths = [(finished / f"{name}.pt", tmp_path / f"{name}.pt") for name in MODELS]
    for seed in (1, small.seed):
        main(replace(small, out=tmp_path, overwrite=True, seed=seed))
        same = [equal(load(one), load(other)) for one, other in paths]
        assert same == [seed == small.seed] * len(MODELS)
    assert reproducible(tmp_path) == reproducible(finished)


def test_another_order_is_other_data_and_no_other_code(own):
    growth = {"dense": None, "wide": Widen(3), "moe": Upcycle(4), "deep": Deepen(2)}
    events, saved = own(**{name: Phase(how, steps=2) for name, how in growth.items()})
    assert [event["how"] for event in select(events, "grow")] == ["Widen", "Upcycle", "Deepen"]
    wide = replace(MODEL, d_model=96, n_heads=6, d_ff=144, logit_scale=1 / 3)
    assert saved[-1].config == replace(wide, num_experts=4, n_layers=4)


def test_a_phase_cut_in_pieces_is_the_same_training_and_no_steps_hand_the_model_on(own):
    flat, model = replace(BRIEF, warmup=0.0, lr_floor=1.0), replace(MODEL, num_experts=4)
    events, (whole,) = own(flat, model, scratch=Phase(steps=4))
    pieces = {name: Phase(steps=steps) for name, steps in (("one", 1), ("none", 0), ("rest", 3))}
    _, (one, none, rest) = own(flat, model, **pieces)
    assert equal(rest, whole) and equal(one, none) and one.tokens == none.tokens
    assert not select(events, "grow") and whole.config == model


def test_the_time_that_a_resume_point_takes_is_not_training_time(own, monkeypatch):
    day, late = 86_400.0, [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr("utils.meter.time", clock)
    keep = Keeper.keep

    def slow(*args):
        keep(*args)
        late[0] += day

    monkeypatch.setattr(Keeper, "keep", slow)
    phase = Phase(steps=3, batch_size=2)
    events, _ = own(BRIEF, only=phase)
    tokens = phase.steps * phase.batch_size * MODEL.seq_len
    assert late[0] >= day
    assert all(step["tokens_per_s"] > tokens / day for step in select(events, "step"))


def test_micro_batches_add_up_to_the_batch(own):
    phase = Phase(batch_size=6, steps=4)
    runs = [own(replace(BRIEF, micro_batch_size=micro), only=phase) for micro in (None, 2, 9)]
    (want, *found) = ([step["loss"] for step in select(events, "step")] for events, _ in runs)
    assert found == [pytest.approx(want, rel=1e-5)] * 2
    for _, (saved,) in runs:
        assert_close(saved.weights, runs[0][1][0].weights, rtol=1e-4, atol=1e-5)


def test_a_growth_that_moves_the_model_stops_the_run_which_goes_on_if_it_may_move(
    small, finished, tmp_path, capsys
):
    run = replace(small, out=tmp_path)
    strict = replace(run, training=replace(FOUR, widen=Widen(2, max_logit_drift=0.0)))
    with pytest.raises(SystemExit, match=r"^1$"):
        run_command(lambda: main(strict))
    assert "phase 3 (wide): Widen changed the model: a logit moved" in capsys.readouterr().err
    assert load(tmp_path / "moe_model_final.pt").state.model()
    assert not (tmp_path / "medium_moe_final.pt").exists()
    assert not select(read(tmp_path / HISTORY), "end")
    main(replace(run, resume=True))
    ends = [load(folder / "large_moe_final.pt").weights for folder in (tmp_path, finished)]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


@pytest.mark.parametrize("log_every", [1, 9], ids=["logged first", "evaluated first"])
def test_a_loss_that_is_not_finite_stops_the_run_where_it_is(own, log_every):
    with pytest.raises(RunStopped, match=r"^phase 1 \(only\), step \d: \w+ is (nan|inf)"):
        own(replace(BRIEF, log_every=log_every), only=Phase(steps=9, lr=1e30))


def test_two_checkpoints_are_the_same_function_right_after_growth_and_not_later(finished, tmp_path):
    dense, grown, last = (finished / f"{MODELS[i]}.pt" for i in (0, 1, 4))
    assert compare_checkpoints(dense, grown) and not compare_checkpoints(dense, last)
    with pytest.raises(InputError, match="did not grow out of"):
        compare_checkpoints(last, dense)
    command = [sys.executable, SCRIPT, "--before", dense, "--after", last]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith("NOT every law holds\n")


def test_when_it_is_evaluated_changes_nothing_else_in_the_record(own):
    def steps(eval_every):
        history, _ = own(replace(BRIEF, log_every=4, eval_every=eval_every), only=Phase(steps=8))
        return [line["loss"] for line in select(history, "step")]

    assert steps(3) == steps(100)

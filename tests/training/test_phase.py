"""Growing, training and saving a phase."""

import errno
import io
import re
import sys
from dataclasses import replace
from time import sleep

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.testing import assert_close

from config import Deepen, Phase, Tolerance, Upcycle, Widen
from models import SLM
from tests.helpers.damage import capture_command
from tests.helpers.small_runs import FOUR_PHASES, MODEL, TRAINING
from train import main
from transfer import TrainState
from utils.checkpoint.model import load_checkpoint
from utils.generate.sampling import Sampling
from utils.generate.stories import write_stories
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.plot.figure import make_figure
from utils.runtime.atomic_io import save_tensors
from utils.runtime.cli import run_command
from utils.runtime.errors import RunStopped
from utils.training.context import check_run, open_run, prepare_run
from utils.training.phase import PROMPTS, grow_and_verify

GROWTHS = {
    "upcycle": Upcycle(4),
    "upcycle, re-initialised": Upcycle(4, reinit_fraction=0.5),
    "widen": Widen(2),
    "deepen": Deepen(2),
}


@pytest.mark.parametrize("growth", GROWTHS.values(), ids=GROWTHS)
def test_what_a_growth_draws_follows_from_the_runs_seed(growth, base_run, tmp_path):
    torch.manual_seed(0)
    start = SLM(MODEL).state_dict()

    def grow_with(seed, name):
        phases = {"dense": Phase(steps=0), "grown": Phase(growth, steps=0)}
        run = replace(base_run, training=TRAINING, phases=phases, seed=seed, out=tmp_path / name)
        state = TrainState(MODEL, {name: weight.clone() for name, weight in start.items()})
        with open_run(prepare_run(check_run(run))) as context:
            return grow_and_verify(state, context.phases[1], context).weights

    one, again, other = grow_with(0, "one"), grow_with(0, "again"), grow_with(1, "other")
    assert_close(one, again, rtol=0, atol=0)
    assert any(not torch.equal(other[name], weight) for name, weight in one.items())


def test_two_growths_of_a_run_draw_different_weights(train_schedule):
    deepen, name = Phase(Deepen(1, "middle"), steps=0), "attn.q_proj.weight"
    model = replace(MODEL, n_layers=3)
    _, (_, once, twice) = train_schedule(
        model=model, start=Phase(steps=0), once=deepen, twice=deepen
    )
    first, second = twice.weights[f"blocks.3.{name}"], twice.weights[f"blocks.2.{name}"]
    assert torch.equal(once.weights[f"blocks.2.{name}"], first)
    assert not torch.equal(second, first)


def test_a_growth_that_moves_the_model_stops_the_run_which_goes_on_if_it_may_move(
    finished, tmp_path, capsys
):
    run = replace(finished, out=tmp_path)
    widen = Widen(2, tolerance=Tolerance(max_logit_drift=0.0))
    strict = replace(run, training=replace(FOUR_PHASES, widen=widen))
    code, _, error = capture_command(lambda: main(strict), capsys)
    assert code == 1 and "phase 3 (wide): Widen changed the model: a logit moved" in error
    assert "--resume goes on from there" in error
    assert load_checkpoint(tmp_path / "moe_model_final.pt")
    assert not (tmp_path / "medium_moe_final.pt").exists()
    events = read_history(tmp_path / HISTORY_FILE)
    assert [e["passed"] for e in select_events(events, "grow")] == [True, False]
    assert not select_events(events, "end")
    main(replace(run, resume=True))
    ends = [load_checkpoint(folder / "large_moe_final.pt") for folder in (tmp_path, finished.out)]
    assert_close(ends[0].weights, ends[1].weights, rtol=0, atol=0)


def test_the_jump_of_a_growth_that_is_not_exact_is_recorded_said_and_drawn(train_schedule, capsys):
    growth, rare = Upcycle(4, reinit_fraction=0.9), replace(TRAINING, eval_every=100)
    dense = Phase(steps=150, batch_size=16, lr=1e-2)
    events, _ = train_schedule(rare, dense=dense, moe=Phase(growth, steps=4))
    (grow,), start = select_events(events, "grow"), select_events(events, "eval")[-2]
    jump = start["valid_loss"] - grow["valid_loss_fp32"]
    assert start["step"] == 0 and start["above_growth"] == jump > 0.02
    output = " ".join(capsys.readouterr().out.split())
    assert "Upcycle changed the function, which may move by 2 nats: probe loss" in output
    assert f"(valid loss {jump:.3f} above that before the growth)" in output
    lines = [line for axes in make_figure({"run": events}).axes for line in axes.lines]
    assert any(jump in line.get_ydata() for line in lines)


@pytest.mark.parametrize("log_every", [1, 9], ids=["logged first", "evaluated first"])
def test_a_loss_that_is_not_finite_stops_the_run_where_it_is(log_every, train_schedule):
    with pytest.raises(RunStopped, match=r"^phase 1 \(only\), step \d: \w+ is (nan|inf)"):
        train_schedule(replace(TRAINING, log_every=log_every), only=Phase(steps=9, lr=1e30))


def test_every_phase_ends_with_stories_that_its_model_writes_with_the_runs_seed(finished):
    events = select_events(read_history(finished.out / HISTORY_FILE), "checkpoint")
    trained = [event for event in events if event["trained"]]
    assert len(trained) == 4
    for event in trained:
        saved = load_checkpoint(finished.out / event["path"])
        stories = write_stories(
            saved.state.model(),
            Tokenizer.from_str(saved.tokenizer),
            saved.special_tokens.stop_ids,
            PROMPTS,
            finished.training.sample_tokens,
            Sampling(seed=finished.seed),
        )
        assert event["samples"] == [story.prompt + story.continuation for story in stories]
        assert [story.prompt for story in stories] == list(PROMPTS)
        assert all(story.continuation for story in stories)


def test_sample_stories_are_shown_with_where_each_begins_and_how_it_ends(train_schedule, capsys):
    train_schedule(only=Phase(steps=1))
    shown = capsys.readouterr().out
    ending = r"\n\((cut off at the limit of 6|end of text after \d) tokens?\)\n\n"
    stories = "".join(rf"> {prompt}\n(?s:.*?){ending}" for prompt in PROMPTS)
    assert re.search(stories, shown)


def test_a_checkpoint_says_how_its_model_came_about(train_schedule, base_run):
    training = replace(TRAINING, load_balance_coef=0.25)
    _, saved = train_schedule(training, dense=Phase(steps=1), moe=Phase(Upcycle(4), steps=0))
    assert [each.phase_name for each in saved] == ["dense", "moe"]
    assert [each.growth_history for each in saved] == [(), (Upcycle(4),)]
    assert {(each.seed, each.load_balance_coef) for each in saved} == {(base_run.seed, 0.25)}


def test_no_character_and_no_byte_of_a_path_stops_a_run(base_run, tmp_path, monkeypatch):
    """A tokenizer that knows a few letters, a terminal that shows others, a path that is none."""
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"日本Oneday "])}
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    Tokenizer(models.BPE(letters, [])).save(f"{tmp_path}/tokenizer.json")
    (folder / "a.txt").write_text("日本 Oneday" * 300, encoding="utf-8")
    data = replace(
        base_run.data, source=f"{folder}/a.txt", tokenizer=str(tmp_path), cache=folder / "cache"
    )
    phases = {"only": Phase(steps=2)}
    run = replace(base_run, data=data, training=TRAINING, phases=phases, out=folder / "run")
    run = replace(run, model=replace(MODEL, vocab_size=0))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252", write_through=True))
    run_command(lambda: main(run))
    (trained,) = select_events(read_history(run.out / HISTORY_FILE), "checkpoint")
    assert trained["samples"], "some prompts have letters that it knows"
    shown = raw.getvalue().decode("cp1252")
    assert "\\u65e5" in shown and "training_curves.png" in shown and "failed" not in shown


def test_a_run_goes_on_where_the_file_system_has_no_locks(train_schedule, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    events, _ = train_schedule(only=Phase(steps=1))
    assert events[-1]["event"] == "end"
    assert "the file system has no locks (No locks available)" in capsys.readouterr().out


def test_a_phase_cut_in_two_is_the_same_training_and_no_steps_hand_the_model_on(train_schedule):
    flat = replace(TRAINING, warmup_fraction=0.0, min_lr_ratio=1.0)
    model = replace(MODEL, num_experts=4)
    _, (whole,) = train_schedule(flat, model, scratch=Phase(steps=4))
    events, (one, none, rest) = train_schedule(
        flat, model, one=Phase(steps=1), none=Phase(steps=0), rest=Phase(steps=3)
    )
    assert_close(rest.weights, whole.weights, rtol=0, atol=0)
    assert_close(one.weights, none.weights, rtol=0, atol=0)
    assert one.tokens == none.tokens and whole.config == model
    assert not select_events(events, "grow")


def test_the_time_that_a_resume_point_takes_is_not_training_time(train_schedule, monkeypatch):
    pause_s, phase = 0.5, Phase(steps=4, batch_size=2)

    def save_slowly(*args, **kwargs):
        save_tensors(*args, **kwargs)
        sleep(pause_s)

    monkeypatch.setattr("utils.training.context.has_room_for_copy", lambda *_: False)
    monkeypatch.setattr("utils.checkpoint.resume.save_tensors", save_slowly)
    training = replace(TRAINING, checkpoint_every="1", log_every=1)
    events, _ = train_schedule(training, only=phase)
    tokens_per_step = phase.batch_size * MODEL.seq_len
    steps = select_events(events, "step")
    training_s = sum(tokens_per_step / step["tokens_per_s"] for step in steps)
    phase_s = select_events(events, "checkpoint")[0]["phase_s"]
    assert training_s + pause_s * phase.steps <= phase_s

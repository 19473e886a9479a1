"""What a run evaluates and judges its growth on is the validation text, and nothing else."""

import random
import re
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close

from config import Deepen, Phase, Upcycle, Widen
from tests.helpers.small_models import MOE, random_model, reference_loss, windows
from tests.helpers.small_runs import MODEL, TRAINING
from train import main
from utils.checkpoint.model import load_checkpoint
from utils.data import spread_windows
from utils.metrics.diagnostics import UNDERUSED_SHARE, underused_experts
from utils.metrics.history import HISTORY_FILE, read_history, select_events
from utils.text.builtin.stories import builtin_stories
from utils.text.sources import SEPARATOR
from utils.training.evaluate import evaluate

SCHEDULE = {
    "dense": Phase(steps=20, batch_size=8, lr=1e-2),
    "moe": Phase(Upcycle(4), steps=4, batch_size=8, lr=1e-2),
    "wide": Phase(Widen(2), steps=4, batch_size=8, lr=1e-2),
    "deep": Phase(Deepen(1), steps=4, batch_size=8, lr=1e-2),
}


def make_windows(text, tokenizer, eos_id, seq_len, count=10**6):
    """Windows (N, seq_len + 1) that predict nearly all of a text, its stories' ends included."""
    ids = []
    for story in text.split(SEPARATOR):
        ids += [*tokenizer.encode(story).ids, eos_id]
    return spread_windows(np.array(ids), seq_len, count)


def in_bits_per_byte(loss, windows, tokenizer):
    """A loss in nats per token of windows into ASCII text, where a token is some whole letters."""
    targets = windows[:, 1:].flatten().tolist()
    return loss / log(2) * len(targets) / len(tokenizer.decode(targets))


@torch.no_grad()
def mean_loss(checkpoint, windows):
    return reference_loss(checkpoint.state.model(), windows).item()


def test_evaluations_and_probe_are_the_validation_text_and_the_loss_is_the_saved_models(
    base_run, tmp_path
):
    folder, chance = tmp_path / "text", random.Random(0)
    folder.mkdir()
    train_text = SEPARATOR.join(builtin_stories(100))
    valid_text = SEPARATOR.join(
        " ".join(str(chance.randrange(10**6)) for _ in range(20)) for _ in range(25)
    )
    (folder / "train.txt").write_text(train_text)
    (folder / "valid.txt").write_text(valid_text)
    data = replace(base_run.data, source=str(folder), tokenizer="learned", num_stories=0)
    training = replace(TRAINING, eval_tokens=600, final_eval_tokens=10**6, probe_sequences=3)
    run = replace(base_run, data=data, training=training, phases=SCHEDULE, precision="fp32")
    run = replace(run, out=tmp_path / "run")
    main(run)
    events = read_history(run.out / HISTORY_FILE)
    checkpoints = [load_checkpoint(run.out / f"{name}_final.pt") for name in SCHEDULE]
    first = checkpoints[0]
    tokenizer, eos_id = Tokenizer.from_str(first.tokenizer), first.special_tokens.eos_id
    windows, train_windows = (
        make_windows(text, tokenizer, eos_id, MODEL.seq_len) for text in (valid_text, train_text)
    )
    probe = make_windows(valid_text, tokenizer, eos_id, MODEL.seq_len, 3)
    chosen = torch.tensor([(2 * k + 1) * len(windows) // (2 * 18) for k in range(18)])
    regular = windows[chosen]  # 600 tokens, in whole windows of 32
    for number, checkpoint in enumerate(checkpoints, 1):
        assert_close(checkpoint.probe, probe)
        last = [e for e in select_events(events, "eval") if e["phase"] == number][-1]
        assert last["valid_loss"] == pytest.approx(mean_loss(checkpoint, regular), rel=1e-5)
        assert last["final_valid_loss"] == pytest.approx(mean_loss(checkpoint, windows), rel=1e-5)
        assert last["valid_loss"] > 1 + mean_loss(checkpoint, train_windows)
        for name, evaluated in (("", regular), ("final_", windows)):
            expected = in_bits_per_byte(last[f"{name}valid_loss"], evaluated, tokenizer)
            assert last[f"{name}bits_per_byte"] == pytest.approx(expected)
    for grow, before in zip(select_events(events, "grow"), checkpoints[:-1], strict=True):
        assert grow["loss_before"] == pytest.approx(mean_loss(before, probe), rel=1e-5)
        assert grow["valid_loss_fp32"] == pytest.approx(mean_loss(before, regular), rel=1e-5)
        assert grow["probe_tokens"] == 3 * MODEL.seq_len
    header = events[0]
    assert (header["eval_tokens"], header["final_eval_tokens"]) == (
        regular[:, 1:].numel(),
        windows[:, 1:].numel(),
    )
    text_bytes = [len(tokenizer.decode(w[:, 1:].flatten().tolist())) for w in (regular, windows)]
    assert [header["eval_bytes"], header["final_eval_bytes"]] == text_bytes
    assert header["final_eval_documents"] == header["valid_documents"] == 25
    assert header["train_sources"] == ["train.txt"] and header["valid_sources"] == ["valid.txt"]


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_every_window_counts_alike_however_many_are_evaluated_at_a_time(batch_size):
    model, tokens = random_model(MOE).float(), windows(MOE, 5)
    loss, usage = evaluate(model, tokens, torch.float32, batch_size)
    assert loss == pytest.approx(reference_loss(model, tokens).item(), rel=1e-5)
    _, at_once = evaluate(model, tokens, torch.float32, 5)
    assert_close(torch.tensor(usage["expert_load"]), torch.tensor(at_once["expert_load"]))


def test_the_loss_in_float32_goes_on_from_where_it_was_before_the_growth(finished):
    events = read_history(finished.out / HISTORY_FILE)
    before = {event["phase"]: event["valid_loss_fp32"] for event in select_events(events, "grow")}
    settling = [event for event in select_events(events, "eval") if "valid_loss_fp32" in event]
    assert [(event["phase"], event["step"]) for event in settling] == [(2, 0), (3, 0), (4, 0)]
    for event in settling:
        assert event["valid_loss_fp32"] == pytest.approx(before[event["phase"]], abs=1e-5)
        assert event["above_growth"] == event["valid_loss_fp32"] - before[event["phase"]]
    offset = {event["phase"]: event["valid_loss"] - event["valid_loss_fp32"] for event in settling}
    for event in select_events(events, "eval"):
        if event["phase"] == 1:
            assert "above_growth" not in event
        elif event not in settling:
            above = event["valid_loss"] - offset[event["phase"]] - before[event["phase"]]
            assert event["above_growth"] == pytest.approx(above) != 0


def test_evaluations_tell_whether_the_new_capacity_is_used(finished):
    evals = select_events(read_history(finished.out / HISTORY_FILE), "eval")
    assert all(("copy_distance" in event) == (event["phase"] > 2) for event in evals)
    assert all(("expert_load" in event) == (event["phase"] > 1) for event in evals)
    routed = [event for event in evals if event["phase"] > 1]
    for event in routed:
        assert all(sum(shares) == pytest.approx(1) for shares in event["expert_load"])
        assert 0 <= event["underused_experts"] <= 1 and event["top_k_margin"] >= 0
        assert 0 < event["router_entropy"] < 1.3863
    distances = [event["expert_distance"] for event in routed]
    assert distances[0] < 1e-6 < min(distances[1:])


def test_a_phase_that_grew_is_evaluated_soon_after_however_rare_evaluations_are(train_schedule):
    training = replace(TRAINING, eval_every=1000)
    events, _ = train_schedule(training, dense=Phase(steps=1), wide=Phase(Widen(2), steps=201))
    evals = select_events(events, "eval")
    moments = [(event["phase"], event["step"]) for event in evals]
    assert moments == [(1, 0), (1, 1), (2, 0), (2, 10), (2, 50), (2, 200), (2, 201)]
    assert [e["step"] for e in evals if "valid_loss_fp32" in e] == [0]


def test_evaluations_that_cost_more_than_they_should_are_told_at_the_start(train_schedule, capsys):
    def told(**options):
        train_schedule(replace(TRAINING, sample_tokens=0, **options), only=Phase(steps=12))
        return " ".join(capsys.readouterr().out.split())

    line = r"about \d.* s to come \(only \S+ s\) evaluations take about \d+% of only; a higher "
    assert re.search(line, told(eval_every=1, eval_tokens=10**5, final_eval_tokens=10**5))
    sparing = told(eval_every=12, eval_tokens=32, final_eval_tokens=32)
    assert re.search(r"about \d.* s to come", sparing) and "evaluations take" not in sparing


def test_experts_that_get_few_tokens_are_counted_and_named(train_schedule, capsys):
    events, _ = train_schedule(dense=Phase(steps=0), moe=Phase(Upcycle(64), steps=1, lr=1e-6))
    output = " ".join(capsys.readouterr().out.split())
    assert "get less than 10% of an equal share of the tokens and so learn little" in output
    assert "a higher --training.load-balance-coef (now 0.01) spreads the tokens" in output
    event = select_events(events, "eval")[-1]
    shares = [share for layer in event["expert_load"] for share in layer]
    underused = sum(share < UNDERUSED_SHARE / 64 for share in shares)
    assert underused and event["underused_experts"] == underused / len(shares)


def test_a_phase_says_once_that_an_expert_is_underused(train_schedule, capsys):
    training = replace(TRAINING, eval_every=1)
    moe = Phase(Upcycle(64), steps=6, lr=1e-6, batch_size=2)
    events, _ = train_schedule(training, dense=Phase(steps=0), moe=moe)
    own = [event for event in select_events(events, "eval") if event["phase"] == 2]
    assert len(own) == 7 and all(event["underused_experts"] for event in own)
    first = set(underused_experts(own[0]["expert_load"]))
    news = [set(underused_experts(event["expert_load"])) - first for event in own]
    assert capsys.readouterr().out.count("of an equal share") <= 1 + sum(map(bool, news)) < 7


def test_how_often_a_run_is_evaluated_changes_nothing_else_in_its_record(train_schedule):
    def losses(eval_every):
        training = replace(TRAINING, log_every=4, eval_every=eval_every)
        events, _ = train_schedule(training, only=Phase(steps=8))
        return [event["loss"] for event in select_events(events, "step")]

    assert losses(3) == losses(100)

"""The steps of a run are recomputed here with torch's own AdamW, from the text on disk and the
documented settings of each parameter; the run must end each phase with the same weights.

Whatever a run does between the text and the weights is judged by that: the batches, the three terms
of the loss, clipping, the learning rate, and what growing does to the settings of AdamW.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from config import Deepen, Phase, TrainingConfig, Upcycle, Widen
from tests.helpers.small_runs import MODEL, TRAINING
from train import main
from transfer import TrainState, apply_plan, make_plan
from utils.checkpoint.model import load_checkpoint
from utils.data import get_batch, prepare_corpus
from utils.metrics.history import HISTORY_FILE, read_history, select_events

EXPERTS, TOP_K, WIDTH = 4, 2, 2
SCHEDULE = {
    "start": Phase(steps=0),
    "dense": Phase(steps=3, batch_size=4, lr=4e-3),
    "moe": Phase(
        Upcycle(EXPERTS, TOP_K), steps=4, batch_size=6, lr=3e-3, init_checkpoint="moe_init.pt"
    ),
    "wide": Phase(Widen(WIDTH), steps=4, batch_size=4, lr=2e-3, init_checkpoint="wide_init.pt"),
    "deep": Phase(Deepen(1), steps=3, batch_size=2, lr=1e-3, init_checkpoint="deep_init.pt"),
}
REPEATS = {
    "start": {},
    "dense": {},
    "moe": {"experts": EXPERTS},
    "wide": {"experts": EXPERTS, "width": WIDTH},
    "deep": {"experts": EXPERTS, "width": WIDTH},
}
"""How often growth has repeated the feed-forward and the width of each phase's model."""
STRONG = TrainingConfig(
    log_every=1,
    eval_every=1000,
    eval_tokens=100,
    sample_tokens=0,
    warmup_fraction=0.5,
    weight_decay=2.0,
    eps=1e-3,
    grad_clip=0.5,
    beta1=0.8,
    beta2=0.9,
    load_balance_coef=0.5,
    z_loss_coef=0.05,
)
"""Settings so strong that a step without one of them ends elsewhere."""
CASES = {
    "by default": {},
    "Adam is reset at a growth": {"optimizer_state_on_growth": "reset"},
    "Adam is reset and warms up": {"optimizer_state_on_growth": "reset-warmup"},
    "one learning rate for all": {"lr_scaling": "none"},
    "in micro-batches": {"micro_batch_size": 2},
}


def adamw_group(name, weight, training, width=1, experts=1):
    """AdamW's settings of a parameter whose width and experts were repeated so often: its rate is
    divided by how often its inputs were, its decay multiplied, and eps is divided as its gradient
    was, by how often its outputs were. Gains do not decay. In the norm by which gradients are
    clipped, the squares of the copies together count as much as the old ones did."""
    inputs, grad_divisor, decays, norm_weight = width, width, 1.0, 1.0
    if "norm" in name:
        inputs, decays, norm_weight = 1, 0.0, width
    elif "embed" in name:
        inputs, norm_weight = 1, width
    elif "router" in name:
        grad_divisor, norm_weight = 1, 1 / width
    elif ".moe." in name:
        chosen = TOP_K if experts > 1 else 1  # experts that are no copies share no gradient
        grad_divisor, norm_weight = (experts * chosen) ** 0.5 * width, chosen
    if training.lr_scaling == "none":
        inputs = grad_divisor = 1
    return {
        "params": [weight],
        "lr_scale": 1 / inputs,
        "weight_decay": decays * training.weight_decay * inputs,
        "eps": training.eps / grad_divisor,
        "norm_weight": norm_weight,
    }


def clip_gradients(groups, max_norm):
    """Clips the gradients of AdamW's groups, of one parameter each, by their norm, and returns
    it."""
    squares = [group["norm_weight"] * group["params"][0].grad.square().sum() for group in groups]
    norm = torch.stack(squares).sum().sqrt()
    for group in groups:
        group["params"][0].grad *= (max_norm / norm).clamp(max=1.0)
    return norm


def loss_terms(model, tokens):
    """Next-token loss, load-balancing loss and router z-loss of windows (B, T + 1)."""
    out = model(tokens[:, :-1])
    loss = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten())
    if not out.routing:
        return torch.stack([loss, torch.zeros(()), torch.zeros(())])
    balances = [layer.load_balance_loss for layer in out.routing]
    z_losses = [layer.z_loss for layer in out.routing]
    return torch.stack([loss, torch.stack(balances).mean(), torch.stack(z_losses).mean()])


def train_again(state, repeats, training, lrs, batches):
    """Trains on batches at learning rates. Returns the state, and for each step the three terms of
    the loss and the gradient's norm."""
    model = state.model().requires_grad_()
    coefs = torch.tensor([1, training.load_balance_coef, training.z_loss_coef])
    weights = dict(model.named_parameters())
    groups = [adamw_group(name, weight, training, **repeats) for name, weight in weights.items()]
    adamw = torch.optim.AdamW(groups, betas=(training.beta1, training.beta2))
    for name, moments in state.adam.items():
        adamw.state[weights[name]] = {key: value.clone() for key, value in moments.items()}
    measured = []
    for lr, tokens in zip(lrs, batches, strict=True):
        for group in adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        micro_batches = tokens.split(training.micro_batch_size or len(tokens))
        terms = torch.stack([loss_terms(model, micro_batch) for micro_batch in micro_batches])
        terms = terms.mean(0)
        (coefs * terms).sum().backward()
        norm = clip_gradients(adamw.param_groups, training.grad_clip)
        adamw.step()
        adamw.zero_grad()
        measured.append([*terms.tolist(), norm.item()])
    adam = {name: dict(adamw.state[weight]) for name, weight in weights.items()}
    return TrainState(state.config, TrainState.from_model(model).weights, adam), measured


def grow_again(state, phase, training, folder):
    """The state before a phase's first step: the weights that the run grew, whose noise is its own,
    and Adam's state as it grows with them, if it is carried."""
    if phase.growth is None:
        return state
    config, plan = make_plan(state.config, phase.growth)
    carries = training.optimizer_state_on_growth == "carry"
    adam = apply_plan(config, plan, state).adam if carries else {}
    return TrainState(config, load_checkpoint(folder / phase.init_checkpoint).weights, adam)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_every_step_of_a_run_is_adamws_on_the_documented_loss_and_settings(
    changes, base_run, tmp_path
):
    training = replace(STRONG, **changes)
    run = replace(
        base_run, training=training, phases=SCHEDULE, out=tmp_path, precision="fp32", seed=3
    )
    main(run)
    steps = select_events(read_history(tmp_path / HISTORY_FILE), "step")
    corpus = prepare_corpus(run.data, MODEL.vocab_size)
    state, done = load_checkpoint(tmp_path / "start_final.pt").state, 0
    for number, (name, phase) in enumerate(SCHEDULE.items(), 1):
        state = grow_again(state, phase, training, tmp_path)
        own = [event for event in steps if event["phase"] == number]
        assert len(own) == phase.steps
        batches = [
            get_batch(corpus.train, MODEL.seq_len, phase.batch_size, run.seed, done + step)
            for step in range(phase.steps)
        ]
        lrs = [event["lr"] for event in own]
        assert not lrs or max(lrs) == phase.lr
        state, measured = train_again(state, REPEATS[name], training, lrs, batches)
        for event, values in zip(own, measured, strict=True):
            recorded = [event[k] for k in ("loss", "load_balance_loss", "z_loss", "grad_norm")]
            assert recorded == pytest.approx(values, rel=1e-4, abs=1e-6)
        done += phase.steps
        saved = load_checkpoint(tmp_path / f"{name}_final.pt")
        assert_close(saved.weights, state.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_growth, first", [("carry", 0.5), ("reset", 1), ("reset-warmup", 0.5)])
def test_a_grown_phase_warms_up_unless_growing_resets_adam_without(
    on_growth, first, train_schedule
):
    training = replace(
        TRAINING, log_every=1, warmup_fraction=0.5, optimizer_state_on_growth=on_growth
    )
    events, _ = train_schedule(
        training, dense=Phase(steps=4, lr=1e-3), wide=Phase(Widen(2), steps=4, lr=1e-3)
    )
    lrs = [[e["lr"] for e in select_events(events, "step") if e["phase"] == n] for n in (1, 2)]
    assert lrs[0][:2] == pytest.approx([0.5e-3, 1e-3])
    assert lrs[1][0] == pytest.approx(first * 1e-3)


@pytest.mark.parametrize("lr_scaling, low", [("width", 1 / 6), ("none", 1.0)])
def test_the_record_has_the_lowest_and_the_highest_rate_that_parameters_have(
    lr_scaling, low, train_schedule, capsys
):
    wider = {"wide": Phase(Widen(2), steps=0), "wider": Phase(Widen(3), steps=2, lr=1e-3)}
    training = replace(TRAINING, log_every=1, lr_scaling=lr_scaling)
    events, _ = train_schedule(training, dense=Phase(steps=2, lr=3e-3), **wider)
    for step in select_events(events, "step"):
        lowest = step["lr"] * (low if step["phase_name"] == "wider" else 1)
        assert (step["lr_min"], step["lr_max"]) == pytest.approx((lowest, step["lr"]))
    assert ("  0.000167 to 0.001\n" in capsys.readouterr().out) == (low < 1), "in the header"


def test_micro_batches_of_a_dense_model_add_up_to_the_batch(train_schedule):
    phase = Phase(batch_size=6, steps=4)
    settings = [replace(TRAINING, micro_batch_size=size) for size in (None, 2, 9)]
    runs = [train_schedule(training, only=phase) for training in settings]
    losses = [[step["loss"] for step in select_events(events, "step")] for events, _ in runs]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2
    whole, *others = [checkpoint.weights for _, (checkpoint,) in runs]
    for weights in others:
        assert_close(weights, whole, rtol=1e-4, atol=1e-5)

import json
from dataclasses import asdict, fields, is_dataclass, replace

import pytest

from config import (
    PRESETS,
    SCHEDULE_FIELDS,
    DataConfig,
    Deepen,
    InputError,
    ModelConfig,
    Phase,
    RopeScaling,
    Run,
    TrainingConfig,
    Upcycle,
    Widen,
)

CHOICES = {"lr_scaling": "same", "at_growth": "reset", "anneal": "each"}


def other(name, value):
    """Another valid value of the same field."""
    if name in CHOICES:
        return CHOICES[name]
    if is_dataclass(value):
        return replace(value, max_logit_drift=7.0)
    if isinstance(value, str):
        return "7"
    return value + 1 if isinstance(value, int) else value / 2 if value else 1


def test_without_a_word_the_schedule_is_the_documented_one():
    phases = Run().schedule
    assert [phase.steps for phase in phases.values()] == [1000, 1000, 500, 500]
    assert [phase.lr for phase in phases.values()] == [3e-4, 2e-4, 1e-4, 5e-5]
    assert [phase.batch_size for phase in phases.values()] == [8, 8, 2, 1]
    assert [phase.grow for phase in phases.values()] == [None, Upcycle(8, 2), Widen(2), Deepen(3)]


def test_every_field_of_the_schedule_reaches_its_phase():
    training = TrainingConfig(
        **{f"steps_phase{i}": i for i in range(1, 5)},
        **{f"lr_phase{i}": i / 10 for i in range(1, 5)},
        batch_size=11,
        batch_size_phase3=13,
        batch_size_phase4=14,
        upcycle=Upcycle(3),
        widen=Widen(5),
        deepen=Deepen(7),
    )
    assert list(Run(training=training).schedule.items()) == [
        ("dense", Phase(None, 1, 11, 0.1, "dense_model.pt")),
        ("moe", Phase(Upcycle(3), 2, 11, 0.2, "moe_model_final.pt", "moe_model_init.pt")),
        ("wide", Phase(Widen(5), 3, 13, 3 / 10, "medium_moe_final.pt")),
        ("deep", Phase(Deepen(7), 4, 14, 0.4, "large_moe_final.pt")),
    ]


@pytest.mark.parametrize("name", [field.name for field in fields(TrainingConfig)])
def test_beside_phases_of_its_own_a_field_is_refused_if_and_only_if_it_would_have_no_effect(name):
    default = TrainingConfig()
    changed = replace(default, **{name: other(name, getattr(default, name))})
    idle = changed.phases() != default.phases()
    assert idle == (name in SCHEDULE_FIELDS)
    own = {"only": Phase()}
    if idle:
        with pytest.raises(InputError, match=rf"phases is set \(only\).*training\.{name} "):
            Run(training=changed, phases=own)
    else:
        assert Run(training=changed, phases=own).schedule == own


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_complete_documented_run_that_json_can_hold(name):
    preset = PRESETS[name]
    assert preset.__name__ == name and preset.__doc__ and preset() == preset()
    grown = [phase.grow for phase in preset().schedule.values()]
    assert [type(how) for how in grown] == [type(None), Upcycle, Widen, Deepen]
    assert json.loads(json.dumps(asdict(preset()), default=str))["model"]["seq_len"] > 0


@pytest.mark.parametrize(
    "kind, bad, says",
    [
        (Run, {"seed": -1}, "seed = -1"),
        (Run, {"seed": 2**63}, "seed = 9223372036854775808"),
        (Phase, {"lr": float("inf")}, "lr = inf"),
        (TrainingConfig, {"grad_clip": float("nan")}, "training.grad_clip = nan"),
        (ModelConfig, {"d_model": 0}, "model.d_model = 0"),
        (ModelConfig, {"n_layers": 0}, "model.n_layers = 0"),
        (ModelConfig, {"d_ff": -1}, "model.d_ff = -1"),
        (ModelConfig, {"seq_len": 0}, "model.seq_len = 0"),
        (ModelConfig, {"vocab_size": -1}, "model.vocab_size = -1"),
        (ModelConfig, {"n_heads": 0}, "model.n_heads = 0"),
        (ModelConfig, {"n_heads": 7}, "model.n_heads = 7 does not divide model.d_model = 512"),
        (ModelConfig, {"n_kv_heads": 3}, "model.n_kv_heads = 3 does not divide model.n_heads = 8"),
        (ModelConfig, {"n_kv_heads": 0}, "model.n_kv_heads = 0"),
        (ModelConfig, {"n_kv_heads": -8}, "model.n_kv_heads = -8"),
        (ModelConfig, {"d_model": 24}, "model.d_model = 24 over model.n_heads = 8 gives 3"),
        (ModelConfig, {"head_dim": 0}, "model.head_dim = 0 must be at least 1"),
        (ModelConfig, {"head_dim": 7}, "even head size, not model.head_dim = 7"),
        (RopeScaling, {"rope_type": "yarn"}, "model.rope_scaling.rope_type = 'yarn'"),
        (RopeScaling, {"factor": 0.0}, "model.rope_scaling.factor = 0.0"),
        (RopeScaling, {"low_freq_factor": 4.0}, "high_freq_factor = 4.0.*low_freq_factor = 4.0"),
        (RopeScaling, {"high_freq_factor": float("nan")}, "high_freq_factor = nan"),
        (ModelConfig, {"num_experts": -1}, "model.num_experts = -1"),
        (ModelConfig, {"num_experts": 4, "top_k": 5}, "model.top_k = 5.*model.num_experts = 4"),
        (ModelConfig, {"num_experts": 4, "top_k": 0}, "model.top_k = 0"),
        (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps = 0.0"),
        (ModelConfig, {"rope_theta": -1.0}, "model.rope_theta = -1.0"),
        (ModelConfig, {"position": "sine"}, "model.position = 'sine'"),
        (Upcycle, {"num_experts": 0}, "num_experts = 0"),
        (Upcycle, {"num_experts": 4, "top_k": 5}, "top_k = 5.*num_experts = 4"),
        (Upcycle, {"top_k": 0}, "top_k = 0"),
        (Widen, {"factor": 0}, "factor = 0"),
        (Widen, {"noise": -0.1}, "noise = -0.1"),
        (Widen, {"noise": float("nan")}, "noise = nan"),
        (Deepen, {"extra_layers": -1}, "extra_layers = -1"),
        (Upcycle, {"router_scale": 0.0}, "router_scale = 0.0"),
        (Upcycle, {"redrawn": 1.5}, "redrawn = 1.5"),
        (Upcycle, {"max_loss_drift": -1.0}, "max_loss_drift = -1.0"),
        (Deepen, {"where": "side"}, "where = 'side'"),
        (Deepen, {"init": "random"}, "init = 'random'"),
        (Deepen, {"max_logit_drift": float("nan")}, "max_logit_drift = nan"),
        (TrainingConfig, {"lr_scaling": "depth"}, "training.lr_scaling = 'depth'"),
        (TrainingConfig, {"at_growth": "drop"}, "training.at_growth = 'drop'"),
        (TrainingConfig, {"anneal": "never"}, "training.anneal = 'never'"),
        (TrainingConfig, {"eps": 0.0}, "training.eps = 0.0"),
        (Phase, {"steps": -1}, "steps = -1"),
        (Phase, {"batch_size": 0}, "batch_size = 0"),
        (Phase, {"lr": -1e-3}, "lr = -0.001"),
        (Phase, {"lr": float("nan")}, "lr = nan"),
        (TrainingConfig, {"log_every": 0}, "training.log_every = 0"),
        (TrainingConfig, {"eval_every": 0}, "training.eval_every = 0"),
        (TrainingConfig, {"probe_sequences": 0}, "training.probe_sequences = 0"),
        (TrainingConfig, {"weight_decay": -1.0}, "training.weight_decay = -1.0"),
        (TrainingConfig, {"eval_tokens": -1}, "training.eval_tokens = -1"),
        (TrainingConfig, {"sample_tokens": -1}, "training.sample_tokens = -1"),
        (TrainingConfig, {"balance_coef": -1.0}, "training.balance_coef = -1.0"),
        (TrainingConfig, {"z_coef": -1.0}, "training.z_coef = -1.0"),
        (TrainingConfig, {"warmup": 1.1}, "training.warmup = 1.1"),
        (TrainingConfig, {"lr_floor": -0.1}, "training.lr_floor = -0.1"),
        (TrainingConfig, {"beta1": 1.0}, "training.beta1 = 1.0"),
        (TrainingConfig, {"beta2": -0.1}, "training.beta2 = -0.1"),
        (TrainingConfig, {"grad_clip": 0.0}, "training.grad_clip = 0.0"),
        (TrainingConfig, {"micro_batch_size": 0}, "training.micro_batch_size = 0"),
        (DataConfig, {"num_stories": -1}, "data.num_stories = -1"),
        (DataConfig, {"holdout": 0.0}, "data.holdout = 0.0"),
        (DataConfig, {"holdout": 1.0}, "data.holdout = 1.0"),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value_in_one_line(kind, bad, says):
    with pytest.raises(InputError, match=says) as raised:
        kind(**bad)
    assert "\n" not in str(raised.value)


def test_the_edge_of_what_is_allowed_is_allowed():
    ModelConfig(vocab_size=0, n_heads=1, n_kv_heads=1, num_experts=3, top_k=3)
    ModelConfig(num_experts=0, top_k=0)
    ModelConfig(d_model=24, position="learned")
    TrainingConfig(warmup=1.0, lr_floor=0.0, beta1=0.0, beta2=0.0, sample_tokens=0, eval_tokens=0)
    Phase(Widen(1, noise=0.0), steps=0, batch_size=1, lr=0.0)
    Upcycle(1, 1), Deepen(0)

import json
import math
import re
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

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
    Tolerance,
    TrainingConfig,
    Upcycle,
    Widen,
    four_phases,
)
from models import meta_model
from tests.helpers.small_models import for_each_config

KINDS = (
    Run,
    ModelConfig,
    RopeScaling,
    TrainingConfig,
    DataConfig,
    Phase,
    Upcycle,
    Widen,
    Deepen,
    Tolerance,
)
FIELDS = [(kind, field.name) for kind in KINDS for field in fields(kind)]
OTHER_CHOICES = {
    "lr_scaling": "none",
    "optimizer_state_on_growth": "reset",
    "decay_to": "floor",
    "cuda_graph": "on",
    "micro_batch_size": 1,
}


def other_value(name, value):
    """Returns another valid value of a field of TrainingConfig."""
    if name in OTHER_CHOICES:
        return OTHER_CHOICES[name]
    if is_dataclass(value):
        return replace(value, tolerance=Tolerance(max_loss_drift=7.0))
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "7"
    return value + 1 if isinstance(value, int) else value / 2


def is_number(kind, name, number):
    """Whether a field is declared as an int, or as a float."""
    hint = get_type_hints(kind)[name]
    return number in (hint, *get_args(hint))


def test_without_settings_the_schedule_is_the_documented_one():
    phases = Run().schedule.values()
    assert [phase.steps for phase in phases] == [1000, 1000, 500, 500]
    assert [phase.lr for phase in phases] == [3e-4, 2e-4, 1e-4, 5e-5]
    assert [phase.batch_size for phase in phases] == [8, 8, 2, 1]
    assert [phase.growth for phase in phases] == [None, Upcycle(8, 2), Widen(2), Deepen(3)]


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
    default, phases = TrainingConfig(), {"only": Phase()}
    changed = replace(default, **{name: other_value(name, getattr(default, name))})
    makes_schedule = four_phases(changed) != four_phases(default)
    assert makes_schedule == (name in SCHEDULE_FIELDS)
    if makes_schedule:
        with pytest.raises(InputError, match=rf"phases is set \(only\).*training\.{name} "):
            Run(training=changed, phases=phases)
    else:
        assert Run(training=changed, phases=phases).schedule == phases


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_complete_documented_run_that_json_can_hold(name):
    preset = PRESETS[name]
    assert preset.__name__ == name and preset.__doc__ and preset() == preset()
    growths = [type(phase.growth) for phase in preset().schedule.values() if phase.growth]
    ways = [Upcycle, Widen, Deepen]
    assert growths == {"single": [], "grow_moe": ways[1:]}.get(name, ways)
    values = json.loads(json.dumps(asdict(preset()), default=str))
    assert ModelConfig.from_dict(values["model"]) == preset().model


@for_each_config
def test_a_model_config_is_read_back_from_a_dictionary(config):
    values = json.loads(json.dumps(asdict(config)))
    assert ModelConfig.from_dict(values) == config
    assert ModelConfig.from_dict({"d_model": 64}) == ModelConfig(d_model=64)


@for_each_config
def test_parameters_are_counted_without_building_the_model(config):
    sizes = {name: weight.numel() for name, weight in meta_model(config).named_parameters()}
    in_experts = sum(size for name, size in sizes.items() if re.search(r"\.moe\.[a-z]+_proj", name))
    idle = in_experts * (config.num_experts - config.top_k) // (config.num_experts or 1)
    assert config.num_params == sum(sizes.values())
    assert config.num_active_params == sum(sizes.values()) - idle


@pytest.mark.parametrize("kind, name", FIELDS)
def test_a_value_of_another_type_is_refused_by_field_and_value(kind, name):
    with pytest.raises(InputError, match=rf"{name} = <object object .*> must be "):
        kind(**{name: object()})


@pytest.mark.parametrize(
    "kind, name", [field for field in FIELDS if is_number(*field, int) or is_number(*field, float)]
)
def test_a_number_is_neither_text_nor_a_truth_value_nor_nan(kind, name):
    wanted = "a whole number" if is_number(kind, name, int) else "a finite number"
    for value in ("x", True, float("nan")):
        message = rf"{name} = {value!r} must be {wanted}, (at least|above) "
        with pytest.raises(InputError, match=message):
            kind(**{name: value})
    if is_number(kind, name, int):
        with pytest.raises(InputError, match=rf"{name} = 60.5 must be {wanted}"):
            kind(**{name: 60.5})
    else:
        with pytest.raises(InputError, match=rf"{name} = inf must be {wanted}"):
            kind(**{name: math.inf})


@pytest.mark.parametrize(
    "kind, field, value, wanted",
    [
        (TrainingConfig, "training.steps_phase1", 60.5, "a whole number, at least 0"),
        (TrainingConfig, "training.log_every", True, "a whole number, at least 1"),
        (TrainingConfig, "training.lr_phase1", "x", "a finite number, at least 0"),
        (TrainingConfig, "training.eps", 0.0, "a finite number, above 0"),
        (TrainingConfig, "training.beta1", 1.0, "a finite number, at least 0 and below 1"),
        (TrainingConfig, "training.micro_batch_size", 0, "a whole number, at least 1, or None"),
        (TrainingConfig, "training.low_memory", 1, "True or False"),
        (TrainingConfig, "training.lr_scaling", "depth", "'none' or 'width'"),
        (DataConfig, "data.tokenizer", None, "text"),
        (Run, "out", "checkpoints", "a path (pathlib.Path)"),
        (Phase, "growth", "widen", "Upcycle(...), or Widen(...), or Deepen(...), or None"),
    ],
)
def test_the_message_says_what_would_do(kind, field, value, wanted):
    message = f"{field} = {value!r} must be {wanted}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        kind(**{field.rpartition(".")[2]: value})


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (Run, {"seed": -1}, "seed = -1"),
        (Run, {"seed": 2**63}, "seed = 9223372036854775808"),
        (Run, {"precision": "fp16"}, "precision = 'fp16'"),
        (Run, {"tracker": "wand"}, "tracker = 'wand'"),
        (Run, {"resume": True, "overwrite": True}, "resume goes on with what overwrite"),
        (
            Run,
            {"init_from": "a", "data": DataConfig(tokenizer="b")},
            "data.tokenizer = b: the model that init_from names has its own",
        ),
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
        (ModelConfig, {"head_dim": 0}, "model.head_dim = 0"),
        (ModelConfig, {"head_dim": 7}, "even head size, not model.head_dim = 7"),
        (ModelConfig, {"num_experts": -1}, "model.num_experts = -1"),
        (ModelConfig, {"num_experts": 4, "top_k": 5}, "model.top_k = 5.*model.num_experts = 4"),
        (ModelConfig, {"num_experts": 4, "top_k": 0}, "model.top_k = 0"),
        (
            ModelConfig,
            {"num_experts": 2, "top_k": 1},
            "model.top_k = 1 with model.num_experts = 2:.* no gradient; take model.top_k = 2 or",
        ),
        (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps = 0.0"),
        (ModelConfig, {"logit_scale": 0.0}, "model.logit_scale = 0.0"),
        (ModelConfig, {"rope_theta": -1.0}, "model.rope_theta = -1.0"),
        (ModelConfig, {"position_embedding": "sine"}, "model.position_embedding = 'sine'"),
        (RopeScaling, {"rope_type": "yarn"}, "model.rope_scaling.rope_type = 'yarn'"),
        (RopeScaling, {"factor": 0.0}, "model.rope_scaling.factor = 0.0"),
        (RopeScaling, {"low_freq_factor": 4.0}, "high_freq_factor = 4.0.*low_freq_factor = 4.0"),
        (Upcycle, {"num_experts": 0}, "upcycle.num_experts = 0"),
        (Upcycle, {"num_experts": 4, "top_k": 5}, "upcycle.top_k = 5.*upcycle.num_experts = 4"),
        (Upcycle, {"top_k": 0}, "upcycle.top_k = 0"),
        (Upcycle, {"top_k": 1}, "upcycle.top_k = 1 with upcycle.num_experts = 8:.* no gradient"),
        (Upcycle, {"router_init_scale": 0.0}, "upcycle.router_init_scale = 0.0"),
        (Upcycle, {"reinit_fraction": 1.5}, "upcycle.reinit_fraction = 1.5"),
        (Widen, {"factor": 0}, "widen.factor = 0"),
        (Widen, {"noise": -0.1}, "widen.noise = -0.1"),
        (Widen, {"tolerance": 1e-3}, "widen.tolerance = 0.001 must be Tolerance"),
        (Deepen, {"extra_layers": -1}, "deepen.extra_layers = -1"),
        (Deepen, {"placement": "side"}, "deepen.placement = 'side'"),
        (Deepen, {"init": "random"}, "deepen.init = 'random'"),
        (Tolerance, {"max_loss_drift": -1.0}, "tolerance.max_loss_drift = -1.0"),
        (Tolerance, {"max_logit_drift": -1.0}, "tolerance.max_logit_drift = -1.0"),
        (Phase, {"steps": -1}, "steps = -1"),
        (Phase, {"batch_size": 0}, "batch_size = 0"),
        (Phase, {"lr": -1e-3}, "lr = -0.001"),
        (TrainingConfig, {"steps_phase3": -1}, "training.steps_phase3 = -1"),
        (TrainingConfig, {"lr_phase3": -1.0}, "training.lr_phase3 = -1.0"),
        (TrainingConfig, {"batch_size_phase3": 0}, "training.batch_size_phase3 = 0"),
        (TrainingConfig, {"optimizer_state_on_growth": "drop"}, "state_on_growth = 'drop'"),
        (TrainingConfig, {"decay_to": "never"}, "training.decay_to = 'never'"),
        (TrainingConfig, {"cuda_graph": "yes"}, "training.cuda_graph = 'yes'"),
        (TrainingConfig, {"eval_every": 0}, "training.eval_every = 0"),
        (TrainingConfig, {"probe_sequences": 0}, "training.probe_sequences = 0"),
        (TrainingConfig, {"weight_decay": -1.0}, "training.weight_decay = -1.0"),
        (TrainingConfig, {"eval_tokens": -1}, "training.eval_tokens = -1"),
        (TrainingConfig, {"sample_tokens": -1}, "training.sample_tokens = -1"),
        (TrainingConfig, {"load_balance_coef": -1.0}, "training.load_balance_coef = -1.0"),
        (TrainingConfig, {"z_loss_coef": -1.0}, "training.z_loss_coef = -1.0"),
        (TrainingConfig, {"warmup_fraction": 1.1}, "training.warmup_fraction = 1.1"),
        (TrainingConfig, {"min_lr_ratio": -0.1}, "training.min_lr_ratio = -0.1"),
        (TrainingConfig, {"beta2": -0.1}, "training.beta2 = -0.1"),
        (TrainingConfig, {"grad_clip": 0.0}, "training.grad_clip = 0.0"),
        (TrainingConfig, {"checkpoint_every": "0min"}, "training.checkpoint_every = '0min' is"),
        (TrainingConfig, {"checkpoint_every": "5sec"}, "training.checkpoint_every = '5sec' is"),
        (DataConfig, {"num_stories": -1}, "data.num_stories = -1"),
        (DataConfig, {"valid_fraction": 0.0}, "data.valid_fraction = 0.0"),
        (DataConfig, {"valid_fraction": 1.0}, "data.valid_fraction = 1.0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_field_and_value_in_one_line(kind, changes, message):
    with pytest.raises(InputError, match=message) as raised:
        kind(**changes)
    assert "\n" not in str(raised.value)


def test_the_edges_of_each_range_are_allowed():
    ModelConfig(vocab_size=0, n_heads=1, n_kv_heads=1, num_experts=3, top_k=3)
    ModelConfig(d_model=24, position_embedding="learned")
    TrainingConfig(warmup_fraction=1.0, min_lr_ratio=0.0, beta1=0.0, beta2=0.0, grad_clip=1)
    TrainingConfig(sample_tokens=0, eval_tokens=0, checkpoint_every="200")
    Phase(Widen(1, noise=0), steps=0, batch_size=1, lr=0)
    Upcycle(1, 1, reinit_fraction=1.0), Deepen(0)
    Tolerance(0, 1), Tolerance(None, 1)
    ModelConfig(top_k=0), ModelConfig(num_experts=1, top_k=1)
    Run(seed=2**63 - 1, out=Path("."))

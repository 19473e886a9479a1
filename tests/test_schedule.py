from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from small import CONFIGS, windows
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Deepen, InputError, Phase, Run, TrainingConfig, Upcycle, Widen, full, tiny
from models import SLM, fused, next_token_loss
from utils import schedule
from utils.schedule import check_memory, flops_per_token, lr_at, memory_gb, stages

OWN = {
    "dense": Phase(steps=3, batch_size=5),
    "wide": Phase(Widen(3), steps=0),
    "rest": Phase(steps=7, batch_size=2),
    "moe": Phase(Upcycle(4), steps=2),
    "deep": Phase(Deepen(2), steps=1, checkpoint="last.pt", init_checkpoint="first.pt"),
}
RUNS = {
    "full": full(),
    "tiny": tiny(),
    "own": replace(tiny(), training=full().training, phases=OWN),
}


def test_the_full_preset_has_the_documented_sizes_and_fits_a_card_of_22_gb():
    found = stages(full())
    sizes = [(s.config.num_active_params / 1e6, s.config.num_params / 1e6) for s in found]
    want = [(64.3, 64.3), (90.3, 246.0), (309.5, 932.4), (374.1, 1152.6)]
    assert sizes == [pytest.approx(size, abs=0.05) for size in want]
    assert all(memory_gb(s.config, s.phase.batch_size, torch.bfloat16) < 22 for s in found)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_each_phase_begins_where_the_one_before_ended(run):
    found = stages(run)
    assert [(stage.name, stage.phase) for stage in found] == list(run.schedule.items())
    assert [stage.number for stage in found] == list(range(1, len(found) + 1))
    assert (found[0].first_step, found[0].first_token) == (0, 0)
    for stage, after in pairwise(found):
        steps, size = stage.phase.steps, stage.phase.batch_size
        assert stage.tokens == steps * size * run.model.seq_len
        assert after.first_step == stage.first_step + steps
        assert after.first_token == stage.first_token + stage.tokens == stage.tokens_at(steps)
        assert after.phase.grow is not None or after.config == stage.config


def test_a_phase_names_its_files_after_itself_unless_told_otherwise():
    names = [stage.files for stage in stages(RUNS["own"])]
    own = ["dense_final.pt", "wide_final.pt", "rest_final.pt", "moe_final.pt"]
    assert names == [*([name] for name in own), ["first.pt", "last.pt"]]


@pytest.mark.parametrize("vocab_size", [0, 300])
def test_a_growth_that_does_not_fit_is_refused_by_the_name_of_its_phase(vocab_size):
    phases = {"a": Phase(Upcycle(4)), "b": Phase(Upcycle(4))}
    model = replace(tiny().model, vocab_size=vocab_size)
    with pytest.raises(InputError, match=r"^phase 2 \(b\): the model already has 4 experts"):
        stages(Run(model, phases=phases))


def test_a_batch_that_does_not_divide_is_refused_by_the_name_of_its_phase():
    def split(micro):
        return stages(replace(full(), training=replace(full().training, micro_batch_size=micro)))

    for micro in (1, 2, 4, 8, 9):  # larger than the batch: the batch at once
        split(micro)
    with pytest.raises(InputError, match=r"^phase 1 \(dense\): .*micro_batch_size = 3 .* of 8"):
        split(3)


@pytest.mark.parametrize(
    "phases, says",
    [
        ({"a/b": Phase()}, r"phase 1 \(a/b\): checkpoint = a/b_final.pt is not a file name"),
        ({"a": Phase(checkpoint="../a.pt")}, "checkpoint = ../a.pt is not a file name"),
        ({"a": Phase(checkpoint="training_history.jsonl")}, "is not a file name that ends in .pt"),
        (
            {"a": Phase(checkpoint="x.pt"), "b": Phase(checkpoint="x.pt")},
            r"phase 2 \(b\): checkpoint = x.pt is also that of phase 1 \(a\)",
        ),
    ],
)
def test_each_phase_must_have_checkpoints_of_its_own(phases, says):
    with pytest.raises(InputError, match=says):
        stages(replace(full(), phases=phases))


@pytest.mark.parametrize("name", ["steps_phase3", "lr_phase3", "batch_size_phase3"])
def test_a_bad_field_of_the_default_schedule_is_refused_by_the_name_of_its_phase(name):
    with pytest.raises(InputError, match=r"phase ?3") as raised:
        stages(replace(full(), training=replace(full().training, **{name: -1})))
    assert " = -1 " in str(raised.value)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_flops_of_a_training_step_are_those_that_torch_counts(config):
    model, tokens = SLM(config), windows(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        next_token_loss(model(tokens[:, :-1]), tokens).backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    # By convention parameters that multiply without a sum, the gains, count as if they had one;
    # half of attention is masked away.
    gains = 6 * (2 * config.n_layers + 1) * config.d_model
    half = 6 * config.n_layers * config.n_heads * config.head_size * config.seq_len
    per_token = flops_per_token(config)
    assert counted["aten.mm"] == tokens[:, 1:].numel() * (per_token - gains - half)
    assert counted["aten.bmm"] == tokens[:, 1:].numel() * 2 * half


@pytest.mark.parametrize("device, fuses", [("cuda", True), ("cuda", False), ("cpu", False)])
def test_what_is_offered_where_memory_is_short_makes_every_phase_fit(device, fuses, monkeypatch):
    monkeypatch.setattr(fused, "available", lambda *_: fuses)
    large = dict.fromkeys(("batch_size", "batch_size_phase3", "batch_size_phase4"), 64)
    run = replace(full(), training=replace(full().training, **large), precision="bf16")
    there, offered = torch.device(device), set()
    for gb in range(1, 60):
        monkeypatch.setattr(schedule, "free_memory_gb", lambda _, gb=gb: gb)
        try:
            check_memory(stages(run), run, there)
        except InputError as error:
            assert str(error).startswith("phase 4 (deep) needs about ")
            lean, micro = ("lean" in str(error)), ("micro-batch-size 1" in str(error))
            offered.add((lean, micro))
            less = {"lean": lean, "micro_batch_size": 1 if micro else None}
            changed = replace(run, training=replace(run.training, **less))
            if lean or micro:
                check_memory(stages(changed), changed, there)
            else:
                assert "only a smaller model would fit" in str(error)
    assert offered == {(False, False), (False, True)} | ({(True, True)} if fuses else set())


def test_the_memory_expected_grows_with_the_sequences_at_a_time_and_with_their_precision():
    config = stages(full())[1].config
    few, many = (memory_gb(config, size, torch.bfloat16) for size in (1, 8))
    assert 16 * config.num_params / 1e9 < few < many < memory_gb(config, 8, torch.float32)


def single(phase, settings):
    return stages(replace(tiny(), phases={"a": phase}, training=settings))[0]


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 40, 41])
def test_the_rate_rises_from_above_0_to_its_peak_and_falls_to_its_floor(warmup, steps):
    settings = TrainingConfig(warmup=warmup, lr_floor=0.2)
    stage = single(Phase(steps=steps, lr=3.0), settings)
    rates = [lr_at(step, stage, settings) for step in range(steps)]
    warm = round(warmup * steps)
    assert all(0.2 * 3.0 <= rate <= 3.0 for rate in rates[warm:]) and min(rates) > 0
    assert rates[:warm] == pytest.approx([3.0 * (step + 1) / warm for step in range(warm)])
    assert warm == steps or rates[warm] == 3.0
    assert all(after < before for before, after in pairwise(rates[warm:]))
    assert warm == steps or lr_at(steps, stage, settings) == pytest.approx(0.6)


def test_the_rate_falls_to_the_next_phases_peak_and_lower_only_at_the_end():
    def ends(idle="", **settings):
        lrs = {"a": 4.0, "b": 1.0, "c": 2.0, "d": 0.1}
        phases = {name: Phase(steps=9 * (name != idle), lr=lr) for name, lr in lrs.items()}
        training = TrainingConfig(lr_floor=0.2, **settings)
        found = stages(replace(tiny(), phases=phases, training=training))
        return [round(lr_at(9, stage, training), 9) for stage in found]

    assert ends() == [1.0, 1.0, 0.4, 0.02]
    assert ends(anneal="each") == [0.8, 0.2, 0.4, 0.02]
    assert ends(idle="b")[0] == 2.0 and ends(idle="d")[2] == 0.4, "a phase that does not train"

from dataclasses import replace
from itertools import pairwise

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Deepen, InputError, Phase, Run, Upcycle, Widen, full, tiny
from models import SLM, meta_model, next_token_loss
from tests.helpers.small_models import for_each_config, windows
from utils.schedule.phases import flops_per_token, resolve_phases

OWN_PHASES = {
    "dense": Phase(steps=3, batch_size=5),
    "wide": Phase(Widen(3), steps=0),
    "rest": Phase(steps=7, batch_size=2),
    "moe": Phase(Upcycle(4), steps=2),
    "deep": Phase(Deepen(2), steps=1, checkpoint="last.pt", init_checkpoint="first.pt"),
}
RUNS = {
    "full": full(),
    "tiny": tiny(),
    "own": replace(tiny(), training=full().training, phases=OWN_PHASES),
}


def test_the_full_preset_grows_from_64_million_to_1_15_billion():
    configs = [phase.config for phase in resolve_phases(full())]
    assert [(config.num_active_params, config.num_params) for config in configs] == [
        (64_279_552, 64_279_552),
        (90_280_960, 245_994_496),
        (309_536_768, 932_390_912),
        (374_054_912, 1_152_622_592),
    ]
    for config in configs:
        weights = meta_model(config).parameters()
        assert config.num_params == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_each_phase_begins_where_the_one_before_ended(run):
    phases = resolve_phases(run)
    assert [phase.number for phase in phases] == list(range(1, len(phases) + 1))
    assert (phases[0].first_step, phases[0].first_token) == (0, 0)
    for phase, after in pairwise(phases):
        assert phase.tokens == phase.steps * phase.batch_size * run.model.seq_len
        assert after.first_step == phase.first_step + phase.steps
        assert after.first_token == phase.first_token + phase.tokens
        assert after.first_token == phase.tokens_at(phase.steps)
        assert after.growth is not None or after.config == phase.config


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_resolved_phase_is_what_the_schedule_says_with_every_growth_so_far(run):
    growth_history = ()
    for phase, (name, scheduled) in zip(resolve_phases(run), run.schedule.items(), strict=True):
        if scheduled.growth is not None:
            growth_history += (scheduled.growth,)
        assert phase.growth_history == growth_history
        assert (phase.name, phase.growth, phase.lr) == (name, scheduled.growth, scheduled.lr)
        assert (phase.steps, phase.batch_size) == (scheduled.steps, scheduled.batch_size)


def test_a_phase_names_its_files_after_itself_unless_the_schedule_names_them():
    names = [phase.checkpoint_files for phase in resolve_phases(RUNS["own"])]
    after_phases = ["dense_final.pt", "wide_final.pt", "rest_final.pt", "moe_final.pt"]
    assert names == [*([name] for name in after_phases), ["first.pt", "last.pt"]]


@pytest.mark.parametrize("vocab_size", [0, 300])
def test_a_growth_that_does_not_apply_is_refused_with_the_name_of_its_phase(vocab_size):
    phases = {"a": Phase(Upcycle(4)), "b": Phase(Upcycle(4))}
    model = replace(tiny().model, vocab_size=vocab_size)
    with pytest.raises(InputError, match=r"^phase 2 \(b\): the model already has 4 experts"):
        resolve_phases(Run(model, phases=phases))


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_name_of_its_phase():
    def resolve_with(micro_batch_size):
        training = replace(full().training, micro_batch_size=micro_batch_size)
        return resolve_phases(replace(full(), training=training))

    for size in (1, 2, 4, 8, 9):  # one larger than the batch takes the batch at once
        resolve_with(size)
    with pytest.raises(InputError, match=r"^phase 1 \(dense\): .*micro_batch_size = 3 .* of 8"):
        resolve_with(3)


@pytest.mark.parametrize(
    "phases, message",
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
def test_each_phase_must_have_checkpoints_of_its_own(phases, message):
    with pytest.raises(InputError, match=message):
        resolve_phases(replace(full(), phases=phases))


@for_each_config
def test_the_flops_of_a_training_step_are_those_that_torch_counts(config):
    model, tokens = SLM(config), windows(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        next_token_loss(model(tokens[:, :-1]), tokens).backward()
    # By convention parameters that multiply without a sum, the gains, count as if they had one, and
    # the half of attention that is masked away does not count.
    gains = 6 * (2 * config.n_layers + 1) * config.d_model
    half_attention = 6 * config.n_layers * config.n_heads * config.head_size * config.seq_len
    per_token = flops_per_token(config) - gains + half_attention
    assert counter.get_total_flops() == tokens[:, 1:].numel() * per_token

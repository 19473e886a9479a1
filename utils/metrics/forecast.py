"""How long the rest of a run will take: its work by kind, at the speed that was measured so far.

Work is counted in floating-point operations of the training step, or in units of its own where that
is no measure. What has not been done yet is taken to cost what it did on the machines of
docs/performance.md, in proportion to the training step.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from config import ModelConfig, TrainingConfig
from utils.data import ValidWindows
from utils.metrics.history import SETTLING_STEPS
from utils.schedule.memory import CHECKPOINT_BYTES_PER_PARAM, POINT_BYTES_PER_PARAM
from utils.schedule.phases import ResolvedPhase, flops_per_token

ByKind = dict[str, float]
"""Amounts of work, or seconds, by TIME_KINDS."""


class DeviceCosts(NamedTuple):
    """What work costs on a kind of device beside the operations of a step."""

    update_flops: float
    """Operations that could be done while the optimizer updates a parameter."""
    dense_layer_flops: float
    """Operations that could be done while a dense layer's are launched, forward and backward."""
    moe_layer_flops: float
    """The same for a layer with experts."""
    narrow_width: float
    """Width at which an operation takes twice as long as in a very wide model."""
    fp32_factor: float
    """How many times as long as in the step's precision an evaluation takes in float32."""
    growth_factor: float
    """How many times as long an operation takes that checks a growth, mostly in float64."""
    start_s: float
    """Seconds for each layer before a phase's first steps are done: optimizer and capture."""
    sample_s: float
    """Seconds for each layer and token of the sample stories."""
    copy_s: float
    """Seconds to copy a byte that is to be written."""
    write_s: float
    """Seconds to write a byte of the last checkpoint, for which the run waits."""


GPU_COSTS = DeviceCosts(
    update_flops=7100,
    dense_layer_flops=0,
    moe_layer_flops=0,
    narrow_width=341,
    fp32_factor=6.5,
    growth_factor=65,
    start_s=0.03,
    sample_s=5e-4,
    copy_s=2e-10,
    write_s=2e-9,
)
"""Fitted to the steps of docs/performance.md, and to the default command's seconds, on an H100."""
CPU_COSTS = DeviceCosts(
    update_flops=200,
    dense_layer_flops=0.46e9,
    moe_layer_flops=0.5e9,
    narrow_width=0,
    fp32_factor=2,
    growth_factor=10,
    start_s=0.02,
    sample_s=1e-3,
    copy_s=2e-10,
    write_s=2e-9,
)
"""Fitted to `train.py tiny` on two cores of an EPYC."""


class Forecast:
    """What is left of a run, phase by phase."""

    def __init__(
        self,
        phases: Sequence[ResolvedPhase],
        training: TrainingConfig,
        valid: ValidWindows,
        device: torch.device,
        dtype: torch.dtype,
        counted_from: int = 1,
    ):
        """`dtype` is the training step's, and `counted_from` the number of the first phase whose
        seconds are counted."""
        self.counted_from = counted_from
        self.phases, self.training, self.valid = phases, training, valid
        self.costs = CPU_COSTS if device.type == "cpu" else GPU_COSTS
        self.is_fp32 = dtype == torch.float32

    def seconds_left(
        self, phase: ResolvedPhase, step: int, step_s: float | None, so_far: Mapping[str, float]
    ) -> list[ByKind]:
        """Returns the seconds to come by kind, of `phase` after `step` steps and of each phase
        after it.

        Args:
            phase: The phase under way.
            step: Its optimizer steps so far.
            step_s: Seconds of a step of this phase; None goes by the steps of the phases before.
            so_far: Seconds of the run so far by kind.
        """
        rates = self.rates(phase, step, step_s, so_far)
        left = [self.work_after(phase, step), *map(self.phase_work, self.phases[phase.number :])]
        return [{kind: amount * rates[kind] for kind, amount in work.items()} for work in left]

    def rates(
        self, phase: ResolvedPhase, step: int, step_s: float | None, so_far: Mapping[str, float]
    ) -> ByKind:
        """Returns the seconds that a unit of each kind of work takes: as measured, once two phases
        were done (what is done for the first time is slow), else in proportion to a step.
        """
        costs = self.costs
        past = self.past(phase)
        before = add_work(*map(self.phase_work, past))
        whole, left = self.phase_work(phase), self.work_after(phase, step)
        done = {
            kind: amount + whole.get(kind, 0.0) - left.get(kind, 0.0)
            for kind, amount in before.items()
        }
        if step_s is None:
            flop_s = so_far["steps"] / done["steps"]
        else:
            flop_s = step_s / self.step_work(phase)
        rates = {
            "steps": flop_s,
            "evaluation": flop_s,
            "growth": flop_s * costs.growth_factor,
            "start": costs.start_s,
            "samples": costs.sample_s,
            "saving": costs.copy_s,
            "waiting": costs.write_s,
        }
        measured = {
            kind: so_far[kind] / done[kind]
            for kind in ("evaluation", "growth", "samples", "saving")
            if len(past) > 1 and before.get(kind) and so_far.get(kind)
        }
        return rates | measured

    def past(self, phase: ResolvedPhase) -> Sequence[ResolvedPhase]:
        """Returns the phases before one whose seconds are counted."""
        return self.phases[self.counted_from - 1 : phase.number - 1]

    def step_work(self, phase: ResolvedPhase) -> float:
        """Returns the work of a step of a phase."""
        config, costs = phase.config, self.costs
        layer = costs.moe_layer_flops if config.num_experts else costs.dense_layer_flops
        flops = 3 * self.forward_work(config, phase.tokens_per_step)
        return flops + config.n_layers * layer + costs.update_flops * config.num_params

    def forward_work(self, config: ModelConfig, tokens: float) -> float:
        """Returns the work of evaluating tokens."""
        return tokens * flops_per_token(config) / 3 * (1 + self.costs.narrow_width / config.d_model)

    def phase_work(self, phase: ResolvedPhase) -> ByKind:
        """Returns all of a phase's work."""
        return add_work(self.work_before(phase), self.work_after(phase, 0))

    def work_before(self, phase: ResolvedPhase) -> ByKind:
        """Returns a phase's work before its first step."""
        tokens, costs = self.valid.tokens, self.costs
        work = {"start": float(phase.config.n_layers)}
        if phase.growth and phase.number > 1:  # before the first comes a model that is not known
            before = self.phases[phase.number - 2].config
            exact = self.forward_work(before, tokens)
            if not self.is_fp32:
                exact = costs.fp32_factor * (exact + self.forward_work(phase.config, tokens))
            work["evaluation"] = exact
            probe = self.training.probe_sequences * phase.config.seq_len
            old, new = (self.forward_work(c, probe) for c in (before, phase.config))
            work["growth"] = 3 * old + 2 * new  # the old one also with rounded weights
        if phase.init_checkpoint:
            work["saving"] = float(CHECKPOINT_BYTES_PER_PARAM * phase.config.num_params)
        return work

    def work_after(self, phase: ResolvedPhase, step: int) -> ByKind:
        """Returns a phase's work after `step` steps, what is due then and at its end included."""
        config, is_last = phase.config, phase is self.phases[-1]
        further_tokens = self.valid.final_tokens - self.valid.tokens
        tokens = self.evaluations(phase, step) * self.valid.tokens + further_tokens
        checkpoint_bytes = float(CHECKPOINT_BYTES_PER_PARAM * config.num_params)
        point_bytes = float(POINT_BYTES_PER_PARAM * config.num_params)
        return {
            "steps": (phase.steps - step) * self.step_work(phase),
            "evaluation": self.forward_work(config, tokens),
            "samples": float(config.n_layers * self.training.sample_tokens),
            "saving": checkpoint_bytes if is_last else point_bytes,
            "waiting": checkpoint_bytes if is_last else 0.0,
        }

    def evaluations(self, phase: ResolvedPhase, step: int) -> int:
        """Returns how many evaluations a phase does after `step` steps, one due then included."""
        regular = set(range(0, phase.steps + 1, self.training.eval_every))
        settling = SETTLING_STEPS if phase.growth else ()
        return sum(step <= at <= phase.steps for at in regular | {*settling, phase.steps})


def add_work(*works: ByKind) -> ByKind:
    """Returns the sum of amounts of work."""
    kinds = {kind for work in works for kind in work}
    return {kind: sum(work.get(kind, 0.0) for work in works) for kind in kinds}

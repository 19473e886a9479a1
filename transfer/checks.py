"""Did a growth keep the function? What is measured at a transition, and the limits it is held to.

A model is judged by its logits on a frozen probe batch, and every grown parameter by its plan:

    new, drift = grow(state, Widen(2), probe)
    drift.max_logit_diff     # 2e-5 in float32: the copies' noise cancels up to rounding
    drift.plan_error         # 1e-7: the copies of each input add up to the old weight
    drift.copy_distance      # 0.14: how far the noise has set the copies apart
"""

from dataclasses import asdict, dataclass, field, replace
from math import isfinite

import torch
from torch import Tensor

from config import Growth, Widen, resolve_tolerance
from transfer.growth import make_plan
from transfer.plan import NewParam, Plan, PlanRow, Tile, TrainState, apply_plan
from transfer.probe import ProbeOutput, run_probe

MAX_FLIPPED_SHARE = 1e-3
"""Share of probe tokens, but at least one token, whose routing a rounding tie may flip."""
MAX_PLAN_ERROR = 1e-5
"""Relative difference that float32's rounding may leave between a weight and the sum of its
copies."""
MAX_ROUTER_STD_ERROR = 0.3
"""Relative difference of a new router's spread from Xavier's law; a small router's is random."""


class GrowthError(RuntimeError):
    """A growth moved the model further than it may. The message names what moved, and how far;
    `drift` holds all that was measured."""

    def __init__(self, message: str, drift: "FunctionDrift"):
        super().__init__(message)
        self.drift = drift


@dataclass(frozen=True)
class FunctionDrift:
    """How far a transition moved the model. Losses and KL are in nats per token."""

    loss_before: float
    loss_after: float
    loss_drift: float
    max_logit_diff: float
    """Largest over the tokens that no flipped routing can reach, and over all tokens if the
    function was to change."""
    kl: float
    """Mean KL divergence of the distribution after from the one before."""
    top1_changed: float
    """Share of tokens whose likeliest next token changed."""
    flipped: int
    """Tokens whose routing changed in a layer that both models have."""
    probe_tokens: int
    plan_error: float | None = None
    """Largest difference between a weight and the sum of its copies, relative to its largest
    value."""
    copy_distance: float | None = None
    """Distance of copied output units from their originals, relative, a mean over matrices."""
    router_std: float | None = None
    """Spread of the new router furthest from Xavier's law, relative to that law."""
    load_min: float | None = None
    """Smallest share of a layer's choices that an expert gets on the probe; 1 / experts is fair."""
    load_max: float | None = None
    """Largest such share."""

    @property
    def flips_allowed(self) -> float:
        """Tokens whose routing may change."""
        return max(1, MAX_FLIPPED_SHARE * self.probe_tokens)

    def __str__(self) -> str:
        unused = "; an expert gets no token of the probe" if self.load_min == 0 else ""
        return (
            f"loss {self.loss_after:.6f} (moved by {self.loss_drift:.1e}), "
            f"logits within {self.max_logit_diff:.1e}{unused}"
        )

    def to_json(self) -> dict[str, float | None]:
        """Returns what was measured, with None for what is not finite, which JSON cannot hold."""
        values = asdict(self)
        return {name: v if v is None or isfinite(v) else None for name, v in values.items()}


def compare_outputs(
    before: ProbeOutput, after: ProbeOutput, layers: list[int | None], is_exact: bool = True
) -> FunctionDrift:
    """Measures how far two models' outputs on the same probe differ.

    Args:
        before: The old model's output.
        after: The new model's output.
        layers: For each block of the new model the old block that it is, None for a new one.
        is_exact: Whether the function was to stay the same. If not, flipped routing excuses no
            logit.
    """
    flipped_BT = torch.zeros_like(before.loss_BT, dtype=torch.bool)
    if before.expert_ids_BLTC.shape[1]:
        kept = [i for i, old in enumerate(layers) if old is not None]
        flipped_BT = (before.expert_ids_BLTC != after.expert_ids_BLTC[:, kept]).any(-1).any(1)
    # Attention carries a flip on to the later tokens of its window.
    untouched_BT = (flipped_BT & is_exact).cumsum(1) == 0

    kl, diff, top1 = [], [], []
    windows = zip(before.logits_BTV, after.logits_BTV, untouched_BT, strict=True)
    for old, new, untouched in windows:
        old, new = old.to(untouched.device), new.to(untouched.device)
        kl.append(sum_kl(old, new))
        # Where there is nothing left to judge, the share of flips has failed already.
        diff.append((new - old).abs().amax(-1).where(untouched, 0.0).max())
        top1.append((new.argmax(-1) != old.argmax(-1)).sum())
    tokens = before.loss_BT.numel()
    loss_before, loss_after = before.loss_BT.mean().item(), after.loss_BT.mean().item()
    return FunctionDrift(
        loss_before=loss_before,
        loss_after=loss_after,
        loss_drift=to_float64(after.loss_BT - before.loss_BT).mean().item(),
        max_logit_diff=torch.stack(diff).max().item(),
        kl=torch.stack(kl).sum().item() / tokens,
        top1_changed=torch.stack(top1).sum().item() / tokens,
        flipped=int(flipped_BT.sum().item()),
        probe_tokens=tokens,
    )


def to_float64(x: Tensor) -> Tensor:
    """Returns `x` in float64, except on MPS, which has none."""
    return x if x.device.type == "mps" else x.double()


def sum_kl(old_TV: Tensor, new_TV: Tensor) -> Tensor:
    """Returns the sum over tokens of KL(old || new) in nats. Float32 may round it below zero."""
    old, new = (to_float64(logits).log_softmax(-1) for logits in (old_TV, new_TV))
    return (old.exp() * (old - new)).sum()


def copy_distance(row: Tile, weight: Tensor) -> Tensor | None:
    """Returns the mean distance of the copies of a matrix's outputs from the first, relative to it;
    None where the outputs were not copied."""
    if not row.has_input_axis or max(row.repeats[:-1]) == 1:
        return None
    first, *others = row.output_copies(weight)
    distances = torch.stack([(other - first).norm() for other in others])
    return (distances / first.norm().clamp_min(torch.finfo(first.dtype).tiny)).mean()


@dataclass
class PlanChecker:
    """Compares each parameter with its plan as it is made, while the old one still exists."""

    errors: dict[str, Tensor] = field(default_factory=dict)
    copy_distances: list[Tensor] = field(default_factory=list)
    router_stds: list[Tensor] = field(default_factory=list)

    def __call__(self, name: str, row: PlanRow, old: Tensor | None, new: Tensor) -> None:
        if isinstance(row, NewParam):
            if row.is_zero:
                self.errors[name] = new.abs().max()
            elif name.endswith("router.weight"):
                xavier_std = row.init_scale * (2 / sum(new.shape)) ** 0.5
                self.router_stds.append(new.std() / xavier_std)
            return
        if row.reinit_fraction:
            return
        assert old is not None, f"{name} is tiled from nothing"
        tiny = torch.finfo(old.dtype).tiny
        error = (row.fold_copies(new) - old).abs().max()
        self.errors[name] = error / old.abs().max().clamp_min(tiny)
        if (distance := copy_distance(row, new)) is not None:
            self.copy_distances.append(distance)

    def worst(self) -> tuple[str, float]:
        """Returns the parameter that is furthest from its plan, and its error; NaN is furthest."""
        values = torch.stack(list(self.errors.values())).nan_to_num(nan=torch.inf)
        index = int(values.argmax())
        return list(self.errors)[index], values[index].item()

    def summary(self) -> dict[str, float | None]:
        """Returns the fields of FunctionDrift that the plan tells."""
        stds = torch.stack(self.router_stds or [torch.ones(())])
        furthest = (stds - 1).abs().nan_to_num(nan=torch.inf).argmax()
        distances = self.copy_distances
        return {
            "plan_error": self.worst()[1],
            "copy_distance": torch.stack(distances).mean().item() if distances else None,
            "router_std": stds[furthest].item() if self.router_stds else None,
        }


def grow(
    state: TrainState, growth: Growth, probe_BS: Tensor, seed: int = 0, consume: bool = False
) -> tuple[TrainState, FunctionDrift]:
    """Grows `state` as `apply_plan` does, and checks on windows (B, T + 1) that its function
    stayed.

    Raises:
        GrowthError: if the function moved further than `growth` allows.
        InputError: if `growth` does not apply to the model.
    """
    config, plan = make_plan(state.config, growth)
    before = run_probe(state.model(), probe_BS)
    checker = PlanChecker()
    new = apply_plan(config, plan, state, seed, consume, checker)
    after = run_probe(new.model(), probe_BS)

    drift = compare_outputs(before, after, match_plan_blocks(plan), growth.is_exact)
    drift = replace(drift, **checker.summary(), **load_extremes(after, config.num_experts))
    if broken := broken_limits(drift, growth):
        worst = f"the weight furthest from its source is {checker.worst()[0]}"
        raise GrowthError(
            f"{type(growth).__name__} changed the model: {'; '.join(broken)}; {worst}", drift
        )
    return new, drift


def broken_limits(
    drift: FunctionDrift, growth: Growth, tolerance: tuple[float, float] | None = None
) -> list[str]:
    """Returns one phrase for each limit that is exceeded. NaN exceeds every limit.

    Args:
        drift: What was measured.
        growth: The growth that is judged.
        tolerance: Largest |logit difference| and change of the loss; None takes the growth's own.
    """
    logit_limit, loss_limit = tolerance or resolve_tolerance(growth)
    limits: dict[str, tuple[float, float]] = {
        "a logit moved by {:.3g} (max_logit_drift: {:g})": (drift.max_logit_diff, logit_limit),
        "the loss moved by {:.3g} (max_loss_drift: {:g})": (abs(drift.loss_drift), loss_limit),
    }
    if growth.is_exact:
        phrase = "the routing of {:.0f} probe tokens changed (allowed: {:g})"
        limits[phrase] = (drift.flipped, drift.flips_allowed)
    if drift.plan_error is not None:
        phrase = "weights are off their copies by a relative {:.3g} (allowed: {:g})"
        limits[phrase] = (drift.plan_error, MAX_PLAN_ERROR)
    if drift.router_std is not None:
        phrase = "a router's spread is off Xavier's by {:.3g} (allowed: {:g})"
        limits[phrase] = (abs(drift.router_std - 1), MAX_ROUTER_STD_ERROR)
    broken = [
        phrase.format(value, limit)
        for phrase, (value, limit) in limits.items()
        if not value <= limit
    ]
    has_noise = isinstance(growth, Widen) and growth.noise and growth.factor > 1
    if has_noise and drift.copy_distance == 0:
        broken.append("the copies are alike in spite of the noise")
    return broken


def match_plan_blocks(plan: Plan) -> list[int | None]:
    """Returns for each block of the new model the old block that it is, None for a new one."""
    rows = [row for name, row in plan.items() if name.endswith("attn_norm.weight")]
    return [
        int(row.source.split(".")[1]) if isinstance(row, Tile) and not row.is_duplicate else None
        for row in rows
    ]


def load_extremes(output: ProbeOutput, num_experts: int) -> dict[str, float]:
    """Returns FunctionDrift's smallest and largest load of an expert; nothing when dense."""
    if not num_experts:
        return {}
    load_LE = probe_expert_load(output, num_experts)
    return {"load_min": load_LE.min().item(), "load_max": load_LE.max().item()}


def probe_expert_load(output: ProbeOutput, num_experts: int) -> Tensor:
    """Returns the share of each layer's choices that went to each expert, (L, E)."""
    ids_LM = output.expert_ids_BLTC.transpose(0, 1).flatten(1)
    count_LE = output.loss_BT.new_zeros(len(ids_LM), num_experts)
    ones = torch.ones_like(ids_LM, dtype=count_LE.dtype)
    return count_LE.scatter_add(1, ids_LM, ones) / ids_LM.shape[1]

"""Did a growth keep the function? What is measured at a transition, and the limits it is held to.

A model is judged by its logits on a frozen probe batch, in float64 where the device has it, and
every grown parameter by its plan:

    new, drift = grow(state, Widen(2), probe)
    drift.max_logit_diff     # 2e-8: the noise cancels up to the rounding of the stored weights
    drift.logit_limit        # 3e-7: how much that rounding, measured on the old model, may do
    drift.plan_error         # 6e-8: the copies of each input add up to the old weight
    drift.copy_distance      # 0.14: how far the noise has set the copies apart
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from config import Growth
from models import SLM
from transfer.growth import make_plan
from transfer.plan import NewParam, Plan, PlanRow, Tile, TrainState, apply_plan
from transfer.probe import LOGIT_TOKENS, ProbeOutput, run_probe

MAX_RELATIVE_DRIFT = 1e-8
"""Largest change of a logit, relative to the largest logit, where no weight is rounded. In float64
it is 1e-14 on random models and 1e-15 on SmolLM2-135M."""
FLOOR_FACTOR = 8
"""How many times as far as on the part of the probe that is measured rounding may move a logit."""
MAX_FLIPPED_SHARE = 1e-3
"""Share of probe tokens, but at least one token, whose routing a rounding tie may flip."""
MIN_JUDGED_SHARE = 0.75
"""Share of probe tokens that no flipped routing may reach, so that their logits are judged."""
MAX_LOSS_CHANGE = 2.0
"""Largest change of the loss, in nats, by a growth that is not exact: five times what
re-initialising half of each expert cost (docs/growth.md)."""
MAX_STD_ERROR = 0.3
"""Relative difference of a new router's spread from Xavier's law, or of a matrix's noise from what
was asked for; that of a small matrix is random."""


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
    function was to change. In float64 where the device has it."""
    kl: float
    """Mean KL divergence of the distribution after from the one before."""
    top1_changed: float
    """Share of tokens whose likeliest next token changed."""
    flipped: int
    """Tokens whose routing changed in a layer that both models have."""
    flip_margin: float
    """Largest lead, in the old router's logits, of an expert that was chosen and is no more; 0
    where nothing flipped. Rounding flips only what is nearly a tie."""
    judged_share: float
    """Share of the tokens that no flipped routing can reach."""
    probe_tokens: int
    max_logit_diff_fp32: float | None = None
    """The same as max_logit_diff in float32, whose own rounding is most of it; None where its
    routing leaves too little to compare."""
    logit_limit: float | None = None
    """How large max_logit_diff may be."""
    margin_limit: float | None = None
    """How large flip_margin may be."""
    plan_error: float | None = None
    """Largest difference between a weight and the sum of its copies, relative to the weight: of the
    largest values, and of the norms."""
    plan_limit: float | None = None
    """What rounding may leave of plan_error."""
    copy_distance: float | None = None
    """Distance of copied output units from their originals, relative, a mean over matrices."""
    noise_std: float | None = None
    """Spread of the noise of the matrix furthest from what was asked for, relative to that."""
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
        single = self.max_logit_diff_fp32
        in_float32 = "" if single is None else f" ({single:.1e} in float32)"
        return (
            f"loss {self.loss_after:.6f} (moved by {self.loss_drift:.1e}), "
            f"logits within {self.max_logit_diff:.1e}{in_float32}{unused}"
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
    flipped_BLT, reached_BT = find_flips(before, after, layers)
    untouched_BT = ~reached_BT if is_exact else torch.ones_like(reached_BT)
    margins_BLT = before.margin_BLT.where(flipped_BLT, 0.0)

    kl, diff, top1 = [], [], []
    chunks = zip(before.logits(), after.logits(), strict=True)
    for (old, new), untouched in zip(
        chunks, untouched_BT.flatten().split(LOGIT_TOKENS), strict=True
    ):
        kl.append(sum_kl(old, new))
        # Where there is nothing left to judge, the share of judged tokens has failed already.
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
        flipped=int(flipped_BLT.any(1).sum().item()),
        flip_margin=margins_BLT.max().item() if margins_BLT.numel() else 0.0,
        judged_share=untouched_BT.sum().item() / tokens,
        probe_tokens=tokens,
    )


def find_flips(
    before: ProbeOutput, after: ProbeOutput, layers: list[int | None]
) -> tuple[Tensor, Tensor]:
    """Returns which tokens (B, L, T) go to other experts in a layer that both models have, and
    which (B, T) that can reach: attention carries it on to the later tokens of its window."""
    if not before.expert_ids_BLTC.shape[1]:
        flipped_BLT = before.margin_BLT.bool()
    else:
        kept = [i for i, old in enumerate(layers) if old is not None]
        flipped_BLT = (before.expert_ids_BLTC != after.expert_ids_BLTC[:, kept]).any(-1)
    return flipped_BLT, flipped_BLT.any(1).cumsum(1) > 0


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


def noise_std(row: Tile, old: Tensor, new: Tensor) -> Tensor | None:
    """Returns the spread of a matrix's noise relative to what its row asks for; None where it asks
    for none."""
    if not row.is_noisy:
        return None
    spread = (new - row.tile_scaled(old, row.scale)).std()
    wanted = row.noise * row.scale * old.std()
    return torch.where(wanted > 0, spread / wanted, 1 + spread)  # zeros get no noise


def relative_error(copies: Tensor, target: Tensor) -> Tensor:
    """Returns how far copies (N, *shape) are from what they should all be, relative to it: the
    larger one of the largest values' ratio and the norms'."""
    error, tiny = copies - target, torch.finfo(target.dtype).tiny
    largest, norm = partial(torch.linalg.vector_norm, ord=inf), torch.linalg.vector_norm
    by_norm = norm(error) / (norm(target) * len(error) ** 0.5).clamp_min(tiny)
    return torch.maximum(largest(error) / largest(target).clamp_min(tiny), by_norm)


@dataclass
class PlanChecker:
    """Compares each parameter with its plan as it is made, while the old one still exists."""

    errors: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    copy_distances: list[Tensor] = field(default_factory=list)
    noise_stds: list[Tensor] = field(default_factory=list)
    router_stds: list[Tensor] = field(default_factory=list)

    def __call__(self, name: str, row: PlanRow, old: Tensor | None, new: Tensor) -> None:
        if isinstance(row, NewParam):
            if row.is_zero:
                self.errors[name], self.limits[name] = new.abs().max(), 0.0
            elif name.endswith("router.weight"):
                xavier_std = row.init_scale * (2 / sum(new.shape)) ** 0.5
                self.router_stds.append(new.std() / xavier_std)
            return
        if row.reinit_fraction:
            return
        assert old is not None, f"{name} is tiled from nothing"
        self.limits[name] = rounding_limit(row, new.dtype)
        if row.scale != 1:  # what is only repeated has nothing to add up
            old, new = to_float64(old), to_float64(new)
        self.errors[name] = relative_error(row.fold_copies(new), old)
        if (distance := copy_distance(row, new)) is not None:
            self.copy_distances.append(distance)
        if (spread := noise_std(row, old, new)) is not None:
            self.noise_stds.append(spread)

    def worst(self) -> tuple[str, float, float]:
        """Returns the parameter that is furthest above what rounding may do to it, its error, and
        what rounding may do; NaN is furthest."""
        names, limits = list(self.errors), list(self.limits.values())
        errors = torch.stack([to_float64(error) for error in self.errors.values()]).cpu()
        excess = errors.nan_to_num(nan=torch.inf) / torch.tensor(limits, dtype=errors.dtype)
        index = int(excess.nan_to_num(nan=0.0).argmax())  # 0 / 0: as it must be
        return names[index], errors[index].item(), limits[index]

    def summary(self) -> dict[str, float | None]:
        """Returns the fields of FunctionDrift that the plan tells."""
        (_, error, limit), distances = self.worst(), self.copy_distances
        return {
            "plan_error": error,
            "plan_limit": limit,
            "copy_distance": torch.stack(distances).mean().item() if distances else None,
            "noise_std": furthest_from_one(self.noise_stds),
            "router_std": furthest_from_one(self.router_stds),
        }


def rounding_limit(row: Tile, dtype: torch.dtype) -> float:
    """Returns how far rounding to `dtype` may take the sum of a weight's copies from the weight,
    relative to it: a rounding for each copy, and a few for the noise and the sum; nothing where
    none is rounded."""
    if not row.is_rounded:
        return torch.finfo(dtype).tiny
    copies = row.repeats[-1] if row.has_input_axis else 1
    return (copies + 3) * torch.finfo(dtype).eps / 2 * (1 + row.noise)


def furthest_from_one(values: list[Tensor]) -> float | None:
    """Returns the value furthest from 1; NaN is furthest, and None stands for no value."""
    if not values:
        return None
    stds = torch.stack(values)
    return stds[(stds - 1).abs().nan_to_num(nan=torch.inf).argmax()].item()


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
    model = state.model()
    before = run_twice(model, probe_BS)
    by_rounding = rounding_drift(model, probe_BS, before[0], plan_roundings(plan))
    del model  # so that what is consumed can be freed
    checker = PlanChecker()
    new = apply_plan(config, plan, state, seed, consume, checker)
    after = run_twice(new.model(), probe_BS)

    logit_limit, loss_limit = resolve_tolerance(growth, by_rounding.logit)
    drift = replace(
        compare_twice(before, after, match_plan_blocks(plan), growth.is_exact),
        logit_limit=logit_limit,
        margin_limit=by_rounding.margin,
        **checker.summary(),
        **load_extremes(after[0], config.num_experts),
    )
    if broken := broken_limits(drift, loss_limit, growth.is_exact):
        worst = f"the weight furthest from its source is {checker.worst()[0]}"
        raise GrowthError(
            f"{type(growth).__name__} changed the model: {'; '.join(broken)}; {worst}", drift
        )
    return new, drift


def run_twice(model: SLM, probe_BS: Tensor) -> tuple[ProbeOutput, ProbeOutput]:
    """Returns what a model computes on windows (B, T + 1) in the dtype that judges, and in
    float32."""
    output = run_probe(model, probe_BS)
    is_float32 = output.loss_BT.dtype == torch.float32
    return output, output if is_float32 else run_probe(model, probe_BS, torch.float32)


def compare_twice(
    before: tuple[ProbeOutput, ProbeOutput],
    after: tuple[ProbeOutput, ProbeOutput],
    layers: list[int | None],
    is_exact: bool = True,
) -> FunctionDrift:
    """Measures like `compare_outputs` how far the outputs that judge differ, and how far the logits
    do in float32. Both models' outputs are those of `run_twice`."""
    drift, in_float32 = (
        compare_outputs(*outputs, layers, is_exact) for outputs in zip(before, after, strict=True)
    )
    is_judged = in_float32.judged_share >= MIN_JUDGED_SHARE
    return replace(drift, max_logit_diff_fp32=in_float32.max_logit_diff if is_judged else None)


def plan_roundings(plan: Plan) -> float:
    """Returns how large the rounding of the weights that a plan makes is, in roundings of the old
    weights: 0 where it only repeats them, more than 1 where noise makes them larger."""
    tiles = [row for row in plan.values() if isinstance(row, Tile) and row.is_rounded]
    return max((1 + row.noise for row in tiles), default=0.0)


class RoundingDrift(NamedTuple):
    """How far rounding alone moves a model."""

    logit: float
    """Largest |logit difference|."""
    margin: float
    """Largest change of a router's margin (`ProbeOutput.margin_BLT`)."""


def rounding_drift(
    model: SLM, probe_BS: Tensor, output: ProbeOutput, roundings: float
) -> RoundingDrift:
    """Returns how far rounding alone may move a growing model.

    In float64 that is MAX_RELATIVE_DRIFT of the largest value where no weight is rounded. Where
    some are, it is more by FLOOR_FACTOR times what one rounding of every weight to float32 does to
    the first window. In float32 it is FLOOR_FACTOR times what computing in it does to that window.

    Args:
        model: The model before it grows.
        probe_BS: The windows (B, T + 1).
        output: What the model computes on them, in the dtype that judges.
        roundings: How often its weights are rounded (`plan_roundings`).
    """
    floor, window_1S = RoundingDrift(0.0, 0.0), probe_BS[:1]
    if output.loss_BT.dtype == torch.float32:
        on_cpu = TrainState.from_model(model).to(torch.device("cpu")).model()
        kinds = torch.float32, torch.float64
        floor = measure_rounding(*(run_probe(on_cpu, window_1S.cpu(), kind) for kind in kinds))
        roundings = 1.0
    elif roundings:
        stored = torch.promote_types(model.norm.weight.dtype, torch.float32)
        unit = torch.finfo(stored).eps / 2
        rounded = run_probe(model, window_1S, rounding=unit)
        floor = measure_rounding(rounded, output.first_window())
    margins = output.margin_BLT[output.margin_BLT.isfinite()]
    largest = output.largest_logit(), margins.max().item() if margins.numel() else 0.0
    logit, margin = (
        MAX_RELATIVE_DRIFT * value + FLOOR_FACTOR * roundings * moved
        for value, moved in zip(largest, floor, strict=True)
    )
    return RoundingDrift(logit, margin)


def measure_rounding(one: ProbeOutput, other: ProbeOutput) -> RoundingDrift:
    """Returns how far apart two outputs of one model on the same windows are, on the tokens that no
    flipped routing can reach."""
    layers: list[int | None] = [*range(one.expert_ids_BLTC.shape[1])]
    logit = compare_outputs(one, other, layers).max_logit_diff
    _, reached_BT = find_flips(one, other, layers)
    moved_BLT = (one.margin_BLT - other.margin_BLT).abs().masked_fill(reached_BT[:, None], 0.0)
    moved_BLT = moved_BLT.nan_to_num(nan=0.0)  # where all experts are chosen
    return RoundingDrift(logit, moved_BLT.max().item() if moved_BLT.numel() else 0.0)


def resolve_tolerance(growth: Growth, by_rounding: float) -> tuple[float, float]:
    """Returns the largest |logit difference| and the largest change of the loss, in nats, that a
    growth may cause: the user's limits, and for each None what rounding may do where the function
    is kept. A loss moves by at most twice as much as the logits."""
    logit, loss = (by_rounding, 2 * by_rounding) if growth.is_exact else (inf, MAX_LOSS_CHANGE)
    chosen = growth.tolerance
    return (
        logit if chosen.max_logit_drift is None else chosen.max_logit_drift,
        loss if chosen.max_loss_drift is None else chosen.max_loss_drift,
    )


def broken_limits(drift: FunctionDrift, loss_limit: float, is_exact: bool = True) -> list[str]:
    """Returns one phrase for each limit that is exceeded. NaN exceeds every limit.

    Args:
        drift: What was measured, and its `logit_limit` and `margin_limit`.
        loss_limit: Largest change of the loss, in nats.
        is_exact: Whether the function was to stay the same.
    """
    assert drift.logit_limit is not None and drift.margin_limit is not None
    limits: dict[str, tuple[float, float]] = {
        "a logit moved by {:.3g} (max_logit_drift: {:.3g})": (
            drift.max_logit_diff,
            drift.logit_limit,
        ),
        "the loss moved by {:.3g} (max_loss_drift: {:.3g})": (abs(drift.loss_drift), loss_limit),
    }
    if is_exact:
        phrase = "the routing of {:.0f} probe tokens changed (allowed: {:g})"
        limits[phrase] = (drift.flipped, drift.flips_allowed)
        phrase = "a token left an expert that led by {:.3g} (allowed: {:.3g})"
        limits[phrase] = (drift.flip_margin, drift.margin_limit)
        phrase = "flipped routing reaches {:.0%} of the probe (allowed: {:.0%})"
        limits[phrase] = (1 - drift.judged_share, 1 - MIN_JUDGED_SHARE)
    if drift.plan_error is not None and drift.plan_limit is not None:
        phrase = "weights are off their copies by a relative {:.3g} (allowed: {:.3g})"
        limits[phrase] = (drift.plan_error, drift.plan_limit)
    if drift.noise_std is not None:
        phrase = "a matrix's noise is off what was asked for by {:.3g} (allowed: {:g})"
        limits[phrase] = (abs(drift.noise_std - 1), MAX_STD_ERROR)
    if drift.router_std is not None:
        phrase = "a router's spread is off Xavier's by {:.3g} (allowed: {:g})"
        limits[phrase] = (abs(drift.router_std - 1), MAX_STD_ERROR)
    return [
        phrase.format(value, limit)
        for phrase, (value, limit) in limits.items()
        if not value <= limit
    ]


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

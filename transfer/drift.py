"""Did growing keep the function? What is measured at a transition, and what it is held to.

A model is judged by its logits on a frozen probe batch.
"""

from dataclasses import asdict, dataclass, field, replace
from math import isfinite

import torch
from torch import Tensor

from config import Growth, Widen
from transfer.growth import plan_for
from transfer.plan import Fresh, Plan, Row, State, Tile, carry_out
from transfer.view import View, look

FLIPS_ALLOWED = 1e-3
"""Share of probe tokens, but at least one, whose routing a rounding tie may flip."""
STRUCTURE_ALLOWED = 1e-5
"""Relative: the copies of an input sum up to the old weight but for float32's rounding."""
ROUTER_ALLOWED = 0.3
"""The spread of a small router is itself random."""


class GrowthError(RuntimeError):
    """Growing moved the model further than it may. The message names what moved, and how far;
    `drift` holds all that was measured."""

    def __init__(self, message: str, drift: "Drift"):
        super().__init__(message)
        self.drift = drift


@dataclass(frozen=True)
class Drift:
    """How far a transition moved the model. Losses and KL in nats per token."""

    loss_before: float
    loss_after: float
    loss_drift: float
    max_logit_diff: float
    """Over the tokens that no flipped routing can reach; over all if the function was to change."""
    kl: float
    """Mean divergence of the distribution after from the one before."""
    top1_changed: float
    """Share of tokens whose likeliest next token changed."""
    flipped: int
    """Tokens whose routing changed in a layer that both models have."""
    probe_tokens: int
    structure_error: float | None = None
    """Largest difference between a weight and the copies made of it, relative to its largest."""
    twin_distance: float | None = None
    """Of copied output units from their originals, relative, a mean over matrices."""
    router_std: float | None = None
    """Of the new router furthest from Xavier's law, relative to that law times its scale."""
    load_min: float | None = None
    """Smallest share of the choices that an expert gets on the probe; 1 / experts is fair."""
    load_max: float | None = None

    @property
    def flips_allowed(self) -> float:
        return max(1, FLIPS_ALLOWED * self.probe_tokens)

    def __str__(self) -> str:
        starved = "; an expert gets no token of the probe" if self.load_min == 0 else ""
        return (
            f"loss {self.loss_after:.6f} (moved by {self.loss_drift:.1e}), "
            f"logits within {self.max_logit_diff:.1e}{starved}"
        )

    def finite(self) -> dict[str, float | None]:
        """What was measured, but None for what is not a number, which JSON cannot say."""
        values = asdict(self)
        return {name: v if v is None or isfinite(v) else None for name, v in values.items()}


def compare(before: View, after: View, layers: list[int | None], exact: bool = True) -> Drift:
    """`layers` gives the old block that each block of the new model is, None for a new one. Unless
    the function was to stay the same, flipped routing excuses no logit."""
    flipped_BT = torch.zeros_like(before.loss_BT, dtype=torch.bool)
    if before.chosen_BLTC.shape[1]:
        kept = [i for i, old in enumerate(layers) if old is not None]
        flipped_BT = (before.chosen_BLTC != after.chosen_BLTC[:, kept]).any(-1).any(1)
    # Attention carries a flip on to the later tokens of its window.
    untouched_BT = (flipped_BT & exact).cumsum(1) == 0

    kl, diff, top1 = [], [], []
    views = zip(before.logits_BTV, after.logits_BTV, untouched_BT, strict=True)
    for old, new, untouched in views:
        old, new = old.to(untouched.device), new.to(untouched.device)
        kl.append(divergence(old, new))
        # Where there is nothing left to judge, the share of flips has failed already.
        diff.append((new - old).abs().amax(-1).where(untouched, 0.0).max())
        top1.append((new.argmax(-1) != old.argmax(-1)).sum())
    tokens = before.loss_BT.numel()
    loss_before, loss_after = before.loss_BT.mean().item(), after.loss_BT.mean().item()
    return Drift(
        loss_before=loss_before,
        loss_after=loss_after,
        loss_drift=widest(after.loss_BT - before.loss_BT).mean().item(),
        max_logit_diff=torch.stack(diff).max().item(),
        kl=torch.stack(kl).sum().item() / tokens,
        top1_changed=torch.stack(top1).sum().item() / tokens,
        flipped=int(flipped_BT.sum().item()),
        probe_tokens=tokens,
    )


def widest(x: Tensor) -> Tensor:
    """In float64, but on MPS, which has none."""
    return x if x.device.type == "mps" else x.double()


def divergence(old_TV: Tensor, new_TV: Tensor) -> Tensor:
    """Sum over tokens of KL(old || new). Float32 may round it below zero."""
    old, new = (widest(logits).log_softmax(-1) for logits in (old_TV, new_TV))
    return (old.exp() * (old - new)).sum()


def twin_distance(row: Tile, weight: Tensor) -> Tensor | None:
    """Mean distance of the copies of a matrix's outputs from the first, relative to it; None where
    the outputs were not copied."""
    if not row.summed or max(row.copies[:-1]) == 1:
        return None
    first, *others = row.outputs_of(weight)
    apart = torch.stack([(other - first).norm() for other in others])
    return (apart / first.norm().clamp_min(torch.finfo(first.dtype).tiny)).mean()


@dataclass
class Structure:
    """Looks at each parameter as it is made, while the old one is still there."""

    errors: dict[str, Tensor] = field(default_factory=dict)
    twins: list[Tensor] = field(default_factory=list)
    routers: list[Tensor] = field(default_factory=list)

    def __call__(self, name: str, row: Row, old: Tensor | None, new: Tensor) -> None:
        if isinstance(row, Fresh):
            if row.zero:
                self.errors[name] = new.abs().max()
            elif name.endswith("router.weight"):
                # Xavier's law: uniform with this standard deviation; and the scale it was given.
                self.routers.append(new.std() / (row.scale * (2 / sum(new.shape)) ** 0.5))
            return
        if row.redrawn:
            return
        assert old is not None, f"{name} is tiled from nothing"
        tiny = torch.finfo(old.dtype).tiny
        error = (row.copies_of(new) - old).abs().max()
        self.errors[name] = error / old.abs().max().clamp_min(tiny)
        if (distance := twin_distance(row, new)) is not None:
            self.twins.append(distance)

    def worst(self) -> tuple[str, float]:
        """The parameter whose copies are furthest from the old one; NaN is further than all."""
        values = torch.stack(list(self.errors.values())).nan_to_num(nan=torch.inf)
        index = int(values.argmax())
        return list(self.errors)[index], values[index].item()

    def summary(self) -> dict[str, float | None]:
        """What Drift holds of it, by the names there."""
        spreads = torch.stack(self.routers or [torch.ones(())])
        furthest = (spreads - 1).abs().nan_to_num(nan=torch.inf).argmax()
        return {
            "structure_error": self.worst()[1],
            "twin_distance": torch.stack(self.twins).mean().item() if self.twins else None,
            "router_std": spreads[furthest].item() if self.routers else None,
        }


def grow(
    state: State, how: Growth, probe_BS: Tensor, seed: int = 0, consume: bool = False
) -> tuple[State, Drift]:
    """Grows `state` as `carry_out` does, and checks on windows (B, T + 1) that its function stayed.

    Raises GrowthError where it moved further than `how` allows, InputError where `how` is no fit.
    """
    config, plan = plan_for(state.config, how)
    before = look(state.model(), probe_BS)
    structure = Structure()
    new = carry_out(config, plan, state, seed, consume, structure)
    after = look(new.model(), probe_BS)

    compared = compare(before, after, block_map(plan), how.exact)
    drift = replace(compared, **structure.summary())
    drift = with_loads(drift, after, config.num_experts)
    if broken := broken_laws(drift, how):
        worst = f"the weight furthest from its source is {structure.worst()[0]}"
        raise GrowthError(
            f"{type(how).__name__} changed the model: {'; '.join(broken)}; {worst}", drift
        )
    return new, drift


def broken_laws(drift: Drift, how: Growth) -> list[str]:
    """One phrase for each law that does not hold. A NaN breaks every law that it enters."""
    limits = {
        "a logit moved by {:.3g} (max_logit_drift: {:g})": (drift.max_logit_diff, how.limits.logit),
        "the loss moved by {:.3g} (max_loss_drift: {:g})": (abs(drift.loss_drift), how.limits.loss),
    }
    if how.exact:
        what = "the routing of {:.0f} probe tokens changed (allowed: {:g})"
        limits[what] = (drift.flipped, drift.flips_allowed)
    if drift.structure_error is not None:
        what = "weights are off their copies by a relative {:.3g} (allowed: {:g})"
        limits[what] = (drift.structure_error, STRUCTURE_ALLOWED)
    if drift.router_std is not None:
        what = "a router's spread is off Xavier's by {:.3g} (allowed: {:g})"
        limits[what] = (abs(drift.router_std - 1), ROUTER_ALLOWED)
    broken = [
        what.format(value, limit) for what, (value, limit) in limits.items() if not value <= limit
    ]
    if isinstance(how, Widen) and how.noise and how.factor > 1 and drift.twin_distance == 0:
        broken.append("the copies are alike in spite of the noise")
    return broken


def block_map(plan: Plan) -> list[int | None]:
    """For each block of the new model the old block that it is, None for a new one."""
    rows = [row for name, row in plan.items() if name.endswith("attn_norm.weight")]
    return [
        int(row.source.split(".")[1]) if isinstance(row, Tile) and not row.forked else None
        for row in rows
    ]


def with_loads(drift: Drift, after: View, num_experts: int) -> Drift:
    """Says how unevenly the experts are used, where there are any."""
    if not num_experts:
        return drift
    load_LE = loads(after, num_experts)
    return replace(drift, load_min=load_LE.min().item(), load_max=load_LE.max().item())


def loads(view: View, num_experts: int) -> Tensor:
    """Share of each layer's choices that went to each expert (L, E)."""
    chosen_LM = view.chosen_BLTC.transpose(0, 1).flatten(1)
    count_LE = view.loss_BT.new_zeros(len(chosen_LM), num_experts)
    ones = torch.ones_like(chosen_LM, dtype=count_LE.dtype)
    return count_LE.scatter_add(1, chosen_LM, ones) / chosen_LM.shape[1]

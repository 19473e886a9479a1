"""Whether the capacity that growth added is used, measured on weights and routing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from config import Growth, ModelConfig, Widen
from models import Routing, axes
from transfer import make_plan
from transfer.checks import copy_distance
from transfer.growth import axis_repeats
from transfer.plan import Tile, make_tile, param_shapes

ROUTING_STATS = ("router_entropy", "top_k_margin")
UNDERUSED_SHARE = 0.1
"""An expert is underused with less than this fraction of its fair share of the choices."""


def copied_matrices(config: ModelConfig, growth_history: Sequence[Growth]) -> dict[str, Tile]:
    """Returns the matrices whose outputs the last widening copied, by their name now. What is new
    since then has no copies.

    Args:
        config: The model's configuration before any growth.
        growth_history: Every operator that it has been through.
    """
    rows: dict[str, Tile] = {}
    widened: Callable[[str], Tile] = make_tile
    for growth in growth_history:
        config, plan = make_plan(config, growth)
        if isinstance(growth, Widen) and growth.factor > 1:
            widened = partial(make_tile, **axis_repeats(growth))
            rows = {name: widened(name) for name in param_shapes(config)}
        else:
            rows = {
                name: widened(name)
                for name, row in plan.items()
                if isinstance(row, Tile) and row.source in rows
            }
    return rows


@torch.no_grad()
def weight_stats(rows: dict[str, Tile], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns `copy_distance` and `expert_distance`, means over matrices, where there are any.

    `copy_distance` is that of copied output units from their originals, relative to these.
    `expert_distance` is the root mean square distance of two experts relative to their size: 0
    where they are alike, 1.41 where they have nothing in common, as in a block just inserted.
    """
    distances = [copy_distance(row, weights[name].float()) for name, row in rows.items()]
    stats = {"copy_distance": [distance for distance in distances if distance is not None]}
    stacks = [name for name in weights if axes(name)[0][0] == "expert" and len(axes(name)[0]) > 1]
    stats["expert_distance"] = [
        expert_distance(stack.float())
        for stack in map(weights.__getitem__, stacks)
        if len(stack) > 1
    ]
    return {name: torch.stack(each).mean().item() for name, each in stats.items() if each}


def expert_distance(weight_EOI: Tensor) -> Tensor:
    """Returns the root mean square distance of two experts' weights, relative to their size. Two
    draws differ, squared, by twice the variance."""
    tiny, experts = torch.finfo(weight_EOI.dtype).tiny, len(weight_EOI)
    norm = torch.linalg.vector_norm
    # From the first one, so that equal experts are at no distance. (Torch's `var` over experts
    # takes 25 times as long on a CPU.)
    away_EOI = weight_EOI - weight_EOI[0]
    variance = norm(away_EOI).square() - norm(away_EOI.sum(0)).square() / experts
    variance = variance.clamp_min(0) / (experts - 1)
    return (2 * variance / (norm(weight_EOI).square() / experts).clamp_min(tiny)).sqrt()


def routing_stats(layers: Iterable[Routing]) -> Tensor:
    """Returns ROUTING_STATS of a batch, means over tokens and layers: the entropy, in nats, of the
    distribution over experts (the log of their number: no preference), and how far the logit of the
    last chosen expert is above that of the first one left out (near 0: rounding flips the
    choice)."""
    stats = []
    for layer in layers:
        logits_NE, choices = layer.logits_NE.float(), layer.expert_ids_NC.shape[1]
        entropy = torch.distributions.Categorical(logits=logits_NE, validate_args=False).entropy()
        # Where all experts are chosen there is none to be left out.
        top = logits_NE.topk(min(choices + 1, logits_NE.shape[1])).values
        margin = top[:, choices - 1] - top[:, -1]
        stats.append(torch.stack([entropy.mean(), margin.mean()]))
    return torch.stack(stats).mean(0)


def underused_experts(load: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Returns (layer, expert), from 0, of each underused expert, given each layer's shares of the
    choices."""
    return [
        (layer, expert)
        for layer, shares in enumerate(load)
        for expert, share in enumerate(shares)
        if share < UNDERUSED_SHARE / len(shares)
    ]

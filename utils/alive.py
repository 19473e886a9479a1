"""Is the capacity that growth added in use? Measured on weights and routing, at each evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from config import Growth, ModelConfig, Widen
from models import Routing, axes
from transfer import plan_for
from transfer.drift import twin_distance
from transfer.growth import copied_axes
from transfer.plan import Tile, shapes, tile

ROUTING = ("router_entropy", "top_k_margin")
STARVING = 0.1
"""An expert with less than this share of its fair share has dropped out."""


def twin_rows(config: ModelConfig, growth: Sequence[Growth]) -> dict[str, Tile]:
    """The matrices whose outputs the last widening of a model that began as `config` copied, by
    their name after all of `growth`; what is new since then has no twins."""
    rows: dict[str, Tile] = {}
    repeat: Callable[[str], Tile] = tile
    for how in growth:
        config, plan = plan_for(config, how)
        if isinstance(how, Widen) and how.factor > 1:
            repeat = partial(tile, **copied_axes(how))
            rows = {name: repeat(name) for name in shapes(config)}
        else:
            rows = {
                name: repeat(name)
                for name, row in plan.items()
                if isinstance(row, Tile) and row.source in rows
            }
    return rows


@torch.no_grad()
def weights_alive(rows: dict[str, Tile], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """`twin_distance`: of copied output units from their originals, relative, a mean over matrices.
    `expert_divergence`: root mean square distance of two experts relative to their size, a mean
    over matrices; 0 where they are alike, 1.41 where they have nothing in common, as in a block
    that depth has just added."""
    twins = [twin_distance(row, weights[name].float()) for name, row in rows.items()]
    found = {"twin_distance": [distance for distance in twins if distance is not None]}
    stacks = [name for name in weights if axes(name)[0][0] == "expert" and len(axes(name)[0]) > 1]
    found["expert_divergence"] = [
        divergence(stack.float()) for stack in map(weights.__getitem__, stacks) if len(stack) > 1
    ]
    return {name: torch.stack(each).mean().item() for name, each in found.items() if each}


def divergence(weight_EOI: Tensor) -> Tensor:
    """Two draws differ, squared, by twice the variance."""
    tiny = torch.finfo(weight_EOI.dtype).tiny
    variance = weight_EOI.var(0).sum()
    return (2 * variance / weight_EOI.square().sum((1, 2)).mean().clamp_min(tiny)).sqrt()


def routing_alive(layers: Iterable[Routing]) -> Tensor:
    """ROUTING of a batch, means over tokens and layers: the entropy of the distribution over
    experts, in nats (the log of their number: no preference), and how far the logit of the last
    one chosen is above that of the first left out (near 0: rounding flips the choice)."""
    found = []
    for layer in layers:
        logits_NE, choices = layer.logits_NE.float(), layer.chosen_NC.shape[1]
        entropy = torch.distributions.Categorical(logits=logits_NE, validate_args=False).entropy()
        # Where all are chosen there is none to be left out.
        top = logits_NE.topk(min(choices + 1, logits_NE.shape[1])).values
        margin = top[:, choices - 1] - top[:, -1]
        found.append(torch.stack([entropy.mean(), margin.mean()]))
    return torch.stack(found).mean(0)


def starving(load: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(layer, expert), from 0, of each that has dropped out, given the shares of the choices."""
    return [
        (layer, expert)
        for layer, shares in enumerate(load)
        for expert, share in enumerate(shares)
        if share < STARVING / len(shares)
    ]

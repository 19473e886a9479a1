"""Upcycling: a dense model becomes a mixture of experts that computes the same function."""

from dataclasses import replace

from config import ModelConfig, Upcycle, require
from models import SLM
from transfer.plan import Fresh, Plan, State, carry_out, shapes, tile


def upcycle_plan(config: ModelConfig, how: Upcycle) -> tuple[ModelConfig, Plan]:
    """Every expert starts as the dense feed-forward and the gates of the chosen ones sum to 1, so
    any routing gives the dense output; a random router lets different experts see different tokens.
    Where `how.redrawn` says so, a part of each expert is drawn anew instead."""
    require(not config.num_experts, f"the model already has {config.num_experts} experts per layer")
    new = replace(config, num_experts=how.num_experts, top_k=how.top_k)
    plan: Plan = {}
    for name in shapes(new):
        if ".router." in name:
            plan[name] = Fresh(scale=how.router_scale)
        elif ".moe." in name:
            dense = name.replace(".moe.", ".mlp.") + ".weight"
            plan[name] = tile(name, dense, redrawn=how.redrawn, expert=how.num_experts)
        else:
            plan[name] = tile(name)
    return new, plan


def upcycle(
    model: SLM,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    router_scale: float = 1.0,
    redrawn: float = 0.0,
) -> SLM:
    """A mixture of `num_experts` copies of each feed-forward, `top_k` to a token, with the logits
    of `model`, which is left as it was; with a share of each expert `redrawn` they are others.
    `seed` draws the routers. Raises InputError where `model` has experts already or `top_k` is more
    than there are."""
    how = Upcycle(num_experts, top_k, router_scale, redrawn)
    config, plan = upcycle_plan(model.config, how)
    return carry_out(config, plan, State.of(model), seed).model()

"""Upcycling: a dense model becomes a mixture of experts that computes the same function."""

from dataclasses import replace

from config import ModelConfig, Upcycle, require
from models import SLM
from transfer.plan import Fresh, Plan, State, carry_out, shapes, tile


def upcycle_plan(config: ModelConfig, how: Upcycle) -> tuple[ModelConfig, Plan]:
    """Every expert starts as the dense feed-forward and the gates of the chosen ones sum to 1, so
    any routing gives the dense output; a random router lets different experts see different tokens.
    """
    require(not config.num_experts, f"the model already has {config.num_experts} experts per layer")
    new = replace(config, num_experts=how.num_experts, top_k=how.top_k)
    plan: Plan = {
        name: tile(
            name,
            name.replace(".moe.", ".mlp.") + ".weight" * (".moe." in name),
            expert=how.num_experts,
        )
        for name in shapes(new)
    }
    return new, plan | {name: Fresh() for name in plan if ".router." in name}


def upcycle(model: SLM, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> SLM:
    """A mixture of `num_experts` copies of each feed-forward, `top_k` to a token, with the logits
    of `model`, which is left as it was. `seed` draws the routers. Raises InputError where `model`
    has experts already or `top_k` is more than there are."""
    config, plan = upcycle_plan(model.config, Upcycle(num_experts, top_k))
    return carry_out(config, plan, State.of(model), seed).model()

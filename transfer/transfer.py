"""Upcycling: a dense model becomes a mixture of experts that computes the same function."""

from dataclasses import replace

from config import ModelConfig, Upcycle, require
from models import SLM
from transfer.plan import NewParam, Plan, TrainState, apply_plan, make_tile, param_shapes


def upcycle_plan(config: ModelConfig, growth: Upcycle) -> tuple[ModelConfig, Plan]:
    """Returns the mixture's configuration and the plan (sparse upcycling, arXiv:2212.05055).

    Every expert starts as the dense feed-forward and the weights of the chosen ones sum to 1, so
    any routing gives the dense output; a random router sends different tokens to different experts.

    Raises:
        InputError: if the model has experts already.
    """
    require(not config.num_experts, f"the model already has {config.num_experts} experts per layer")
    new = replace(config, num_experts=growth.num_experts, top_k=growth.top_k)
    plan: Plan = {}
    for name in param_shapes(new):
        if ".router." in name:
            plan[name] = NewParam(init_scale=growth.router_init_scale)
        elif ".moe." in name:
            dense = name.replace(".moe.", ".mlp.") + ".weight"
            plan[name] = make_tile(
                name,
                dense,
                reinit_fraction=growth.reinit_fraction,
                sparsity=growth.sparsity,
                expert=growth.num_experts,
            )
        else:
            plan[name] = make_tile(name)
    return new, plan


def upcycle(
    model: SLM,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    router_init_scale: float = 1.0,
    reinit_fraction: float = 0.0,
) -> SLM:
    """Returns a mixture of experts with the logits of `model`, which stays as it was.

    Args:
        model: A dense model.
        num_experts: Copies of each feed-forward.
        top_k: Experts that each token visits, at least 2 of several.
        seed: Seed of the routers and of re-initialised units.
        router_init_scale: Factor on the routers' Xavier-uniform initialisation.
        reinit_fraction: Fraction of each expert's units to re-initialise. Above 0 the logits
            change.

    Raises:
        InputError: if `model` has experts already, or for a `top_k` that is more than `num_experts`
            or is 1 of several.
    """
    growth = Upcycle(num_experts, top_k, router_init_scale, reinit_fraction)
    config, plan = upcycle_plan(model.config, growth)
    return apply_plan(config, plan, TrainState.from_model(model), seed).model()

"""Growing in width and in depth: configurations to bigger ones, and the plans between them."""

from dataclasses import replace
from functools import partial

from config import Deepen, Growth, ModelConfig, Upcycle, Where, Widen
from models import SLM
from transfer.plan import Fresh, Plan, State, carry_out, shapes, tile
from transfer.transfer import upcycle_plan


def widen_plan(config: ModelConfig, how: Widen) -> tuple[ModelConfig, Plan]:
    """Residual stream, heads and feed-forward are repeated whole; a head keeps its size, so rotary
    positions and attention's scale need no correction, and query heads keep their groups."""
    times = how.factor
    new = replace(
        config,
        d_model=config.d_model * times,
        n_heads=config.n_heads * times,
        n_kv_heads=None if config.n_kv_heads is None else config.n_kv_heads * times,
        d_ff=config.d_ff * times,
        # A tied head sums its copied inputs but cannot be divided: it is the embedding too.
        logit_scale=config.logit_scale / (times if config.tied else 1),
    )
    repeat = partial(tile, noise=how.noise, embed=times, heads=times, kv_heads=times, ffn=times)
    return new, {name: repeat(name) for name in shapes(new)}


def deepen_plan(config: ModelConfig, how: Deepen) -> tuple[ModelConfig, Plan]:
    """New blocks whose output projections are zero hand the residual stream on bit for bit."""
    new = replace(config, n_layers=config.n_layers + how.extra_layers)
    origin = block_origins(config.n_layers, how)
    plan: Plan = {}
    for name in shapes(new):
        stem, *rest = name.split(".", 2)
        if stem != "blocks":
            plan[name] = tile(name)
        elif (old := origin[int(rest[0])]) is not None:
            plan[name] = tile(name, f"blocks.{old}.{rest[1]}")
        else:
            plan[name] = Fresh(zero="o_proj" in name or "down_proj" in name)
    return new, plan


def block_origins(n_layers: int, how: Deepen) -> list[int | None]:
    """For each block of the deeper model the old one it is, or None where it is new. Interleaved,
    the old blocks are cut into runs as even as can be, and a new block follows each."""
    origins: list[int | None] = list(range(n_layers))
    for i in reversed(range(how.extra_layers)):
        end = how.where == "end"
        origins.insert(n_layers if end else -(-(i + 1) * n_layers // how.extra_layers), None)
    return origins


def plan_for(config: ModelConfig, how: Growth) -> tuple[ModelConfig, Plan]:
    """The bigger configuration and the way there. Raises InputError where `how` does not apply."""
    match how:
        case Upcycle():
            return upcycle_plan(config, how)
        case Widen():
            return widen_plan(config, how)
        case Deepen():
            return deepen_plan(config, how)


def widen(model: SLM, factor: int = 2, noise: float = 0.1, seed: int = 0) -> SLM:
    """A model `factor` times as wide with the logits of `model`, which is left as it was. `noise`,
    relative to each weight's standard deviation and drawn with `seed`, sets the copies apart; it
    cancels in the logits. Raises InputError for a `factor` below 1 or a negative `noise`."""
    config, plan = widen_plan(model.config, Widen(factor, noise))
    return carry_out(config, plan, State.of(model), seed).model()


def deepen(model: SLM, extra_layers: int = 3, where: Where = "interleaved", seed: int = 0) -> SLM:
    """A model with `extra_layers` more blocks, `interleaved` or at the `end`, with the logits of
    `model`, which is left as it was. `seed` draws what is not zero in the new blocks. Raises
    InputError for a negative number of them or another place."""
    config, plan = deepen_plan(model.config, Deepen(extra_layers, where))
    return carry_out(config, plan, State.of(model), seed).model()

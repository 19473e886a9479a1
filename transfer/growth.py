"""Growing in width and in depth: configurations to bigger ones, and the plans between them."""

from dataclasses import replace
from functools import partial
from itertools import cycle, groupby, islice

from config import Deepen, Growth, Init, ModelConfig, Upcycle, Where, Widen
from models import SLM
from transfer.plan import Fresh, Plan, State, carry_out, shapes, tile
from transfer.transfer import upcycle_plan


def copied_axes(how: Growth) -> dict[str, int]:
    """How often each axis is copied."""
    match how:
        case Upcycle():
            return {"expert": how.num_experts}
        case Widen():
            return dict.fromkeys(("embed", "heads", "kv_heads", "ffn"), how.factor)
        case Deepen():
            return {}


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
    repeat = partial(tile, noise=how.noise, **copied_axes(how))
    return new, {name: repeat(name) for name in shapes(new)}


def deepen_plan(config: ModelConfig, how: Deepen) -> tuple[ModelConfig, Plan]:
    """New blocks whose output projections are zero hand the residual stream on bit for bit; copies
    do not (G_stack, 2405.15319)."""
    new = replace(config, n_layers=config.n_layers + how.extra_layers)
    origin = block_origins(config.n_layers, how)
    copied = copied_blocks(origin)
    plan: Plan = {}
    for name in shapes(new):
        stem, *rest = name.split(".", 2)
        if stem != "blocks":
            plan[name] = tile(name)
        elif (old := origin[int(rest[0])]) is not None:
            plan[name] = tile(name, f"blocks.{old}.{rest[1]}")
        elif how.init == "copy":
            plan[name] = tile(name, f"blocks.{copied[int(rest[0])]}.{rest[1]}", forked=True)
        else:
            plan[name] = Fresh(zero="o_proj" in name or "down_proj" in name)
    return new, plan


def block_origins(n_layers: int, how: Deepen) -> list[int | None]:
    """For each block of the deeper model the old one it is, or None where it is new. Interleaved,
    the old blocks are cut into runs as even as can be, and a new block follows each."""
    origins: list[int | None] = list(range(n_layers))
    for i in reversed(range(how.extra_layers)):
        match how.where:
            case "interleaved":
                place = -(-(i + 1) * n_layers // how.extra_layers)
            case "middle":
                place = (n_layers + 1) // 2
            case "end":
                place = n_layers
        origins.insert(place, None)
    return origins


def copied_blocks(origins: list[int | None]) -> list[int]:
    """For each block the old one that it is or would be a copy of: a run of new blocks repeats, in
    order, the last of the old ones before it, as many as it can."""
    sources: list[int] = []
    for is_old, run in groupby(origins, lambda old: old is not None):
        if is_old:
            before = [old for old in run if old is not None]
            sources += before
        else:
            length = len(list(run))
            sources += islice(cycle(before[-length:]), length)
    return sources


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


def deepen(
    model: SLM,
    extra_layers: int = 3,
    where: Where = "interleaved",
    seed: int = 0,
    init: Init = "identity",
) -> SLM:
    """A model with `extra_layers` more blocks, `interleaved`, at the `end` or in the `middle`, with
    the logits of `model`, which is left as it was. With `init` "copy" the new blocks are copies of
    old ones and the logits others. `seed` draws what is not zero in new ones. Raises InputError for
    a negative number of them or another place."""
    config, plan = deepen_plan(model.config, Deepen(extra_layers, where, init))
    return carry_out(config, plan, State.of(model), seed).model()

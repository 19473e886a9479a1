"""Growing in width and in depth: from a configuration to a bigger one, and the plan between
them."""

from dataclasses import replace
from functools import partial
from itertools import cycle, groupby, islice

from config import BlockInit, Deepen, Growth, ModelConfig, Placement, Upcycle, Widen
from models import SLM
from transfer.plan import NewParam, Plan, TrainState, apply_plan, make_tile, param_shapes
from transfer.transfer import upcycle_plan


def axis_repeats(growth: Growth) -> dict[str, int]:
    """Returns how often a growth repeats each axis; axes that are not named stay as they are."""
    match growth:
        case Upcycle():
            return {"expert": growth.num_experts}
        case Widen():
            return dict.fromkeys(("embed", "heads", "kv_heads", "ffn"), growth.factor)
        case Deepen():
            return {}


def widen_plan(config: ModelConfig, growth: Widen) -> tuple[ModelConfig, Plan]:
    """Returns the wider configuration and the plan.

    Residual stream, heads and feed-forward are repeated whole (HyperCloning, arXiv:2409.12903). A
    head keeps its size, so rotary positions and attention's scale need no correction, and query
    heads keep their groups.
    """
    times = growth.factor
    new = replace(
        config,
        d_model=config.d_model * times,
        n_heads=config.n_heads * times,
        n_kv_heads=None if config.n_kv_heads is None else config.n_kv_heads * times,
        d_ff=config.d_ff * times,
        # A tied head sums its copied inputs but cannot be divided, because it is the embedding too.
        logit_scale=config.logit_scale / (times if config.tie_embeddings else 1),
    )
    widened = partial(make_tile, noise=growth.noise, **axis_repeats(growth))
    return new, {name: widened(name) for name in param_shapes(new)}


def deepen_plan(config: ModelConfig, growth: Deepen) -> tuple[ModelConfig, Plan]:
    """Returns the deeper configuration and the plan.

    New blocks whose output projections are zero pass the residual stream through bit for bit
    (LLaMA Pro, arXiv:2401.02415); copies of old blocks do not (G_stack, arXiv:2405.15319).
    """
    new = replace(config, n_layers=config.n_layers + growth.extra_layers)
    old_blocks = insert_blocks(config.n_layers, growth)
    copied = copied_blocks(old_blocks)
    plan: Plan = {}
    for name in param_shapes(new):
        stem, *rest = name.split(".", 2)
        if stem != "blocks":
            plan[name] = make_tile(name)
        elif (old := old_blocks[int(rest[0])]) is not None:
            plan[name] = make_tile(name, f"blocks.{old}.{rest[1]}")
        elif growth.init == "copy":
            source = f"blocks.{copied[int(rest[0])]}.{rest[1]}"
            plan[name] = make_tile(name, source, is_duplicate=True)
        else:
            plan[name] = NewParam(is_zero="o_proj" in name or "down_proj" in name)
    return new, plan


def insert_blocks(n_layers: int, growth: Deepen) -> list[int | None]:
    """Returns for each block of the deeper model the old block it is, or None where it is new.
    Interleaved, the old blocks are cut into runs as even as can be, and a new block follows each:
    4 blocks and 2 more give [0, 1, None, 2, 3, None]."""
    blocks: list[int | None] = list(range(n_layers))
    for i in reversed(range(growth.extra_layers)):
        match growth.placement:
            case "interleaved":
                position = -(-(i + 1) * n_layers // growth.extra_layers)
            case "middle":
                position = (n_layers + 1) // 2
            case "end":
                position = n_layers
        blocks.insert(position, None)
    return blocks


def copied_blocks(old_blocks: list[int | None]) -> list[int]:
    """Returns for each block the old block that it is, or would be a copy of: a run of new blocks
    repeats, in order, the last of the old ones before it, as many as it can."""
    sources: list[int] = []
    for is_old, run in groupby(old_blocks, lambda old: old is not None):
        if is_old:
            before = [old for old in run if old is not None]
            sources += before
        else:
            length = len(list(run))
            sources += islice(cycle(before[-length:]), length)
    return sources


def make_plan(config: ModelConfig, growth: Growth) -> tuple[ModelConfig, Plan]:
    """Returns the bigger configuration and the plan that leads there.

    Raises:
        InputError: if the growth does not apply to a model of `config`.
    """
    match growth:
        case Upcycle():
            return upcycle_plan(config, growth)
        case Widen():
            return widen_plan(config, growth)
        case Deepen():
            return deepen_plan(config, growth)


def widen(model: SLM, factor: int = 2, noise: float = 0.1, seed: int = 0) -> SLM:
    """Returns a wider model with the logits of `model`, which stays as it was.

    Args:
        model: The model to widen.
        factor: How many times as wide it becomes.
        noise: Standard deviation of the noise that sets copies apart, relative to each weight's
            own; it cancels in the logits.
        seed: Seed of the noise.

    Raises:
        InputError: for a `factor` below 1 or a negative `noise`.
    """
    config, plan = widen_plan(model.config, Widen(factor, noise))
    return apply_plan(config, plan, TrainState.from_model(model), seed).model()


def deepen(
    model: SLM,
    extra_layers: int = 3,
    placement: Placement = "interleaved",
    seed: int = 0,
    init: BlockInit = "identity",
) -> SLM:
    """Returns a deeper model with the logits of `model`, which stays as it was.

    Args:
        model: The model to deepen.
        extra_layers: Number of new blocks.
        placement: `interleaved`, `end` or `middle`.
        seed: Seed of the new blocks' weights that are not zero.
        init: `identity`, or `copy` for copies of old blocks, which change the logits.

    Raises:
        InputError: for a negative number of blocks or an unknown placement or init.
    """
    config, plan = deepen_plan(model.config, Deepen(extra_layers, placement, init))
    return apply_plan(config, plan, TrainState.from_model(model), seed).model()

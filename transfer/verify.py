"""Is one model the function that another is? For models in hand, without the plan between them."""

from functools import cache

import torch
from torch import Tensor

from config import Deepen, ModelConfig, require
from models import SLM
from transfer.drift import Drift, GrowthError, broken_laws, compare, with_loads
from transfer.view import View, look


def verify(
    before: SLM,
    after: SLM,
    tokens_BT: Tensor,
    max_logit_drift: float = 1e-3,
    max_loss_drift: float = 1e-4,
) -> Drift:
    """How far `after`, grown out of `before` by any operators, is from it on texts (B, T) int64 of
    2 to seq_len + 1 tokens, each of which is predicted from those before it. Both models are judged
    in their own precision and on their own device.

    `max_logit_drift` is the largest |logit difference| allowed, `max_loss_drift` the largest change
    of the mean loss in nats. Raises GrowthError, whose `drift` holds what was measured, where one
    is exceeded, and InputError where the models or the tokens do not belong together.
    """
    check_fit(before.config, after.config, tokens_BT)
    old, new = (look(model, tokens_BT.to(model.norm.weight.device)) for model in (before, after))
    new = View(*(part.to(like.device) for part, like in zip(new, old, strict=True)))
    same_experts = before.config.num_experts == after.config.num_experts
    if not (same_experts and before.config.top_k == after.config.top_k):
        old = old._replace(chosen_BLTC=old.chosen_BLTC[:, :0])  # no choice of one is the other's
    drift = with_loads(compare(old, new, block_match(old, new)), new, after.config.num_experts)
    # Growing by nothing is held to these limits and to no law of its own.
    limits = Deepen(0, max_logit_drift=max_logit_drift, max_loss_drift=max_loss_drift)
    if broken := broken_laws(drift, limits):
        raise GrowthError(f"the models are not the same function: {'; '.join(broken)}", drift)
    return drift


def check_fit(before: ModelConfig, after: ModelConfig, tokens: Tensor) -> None:
    """Raises InputError unless both models can read `tokens` and one may have grown out of the
    other."""
    for name in ("vocab_size", "seq_len"):
        was, now = getattr(before, name), getattr(after, name)
        require(was == now, f"after.{name} = {now} is not before.{name} = {was}")
    layers = before.n_layers, after.n_layers
    require(
        layers[0] <= layers[1], f"after.n_layers = {layers[1]} is less than before's {layers[0]}"
    )
    what = f"tokens = a {tuple(tokens.shape)} tensor of {str(tokens.dtype).removeprefix('torch.')}"
    require(
        tokens.dtype == torch.int64 and tokens.dim() == 2 and len(tokens) > 0,
        f"{what} must be texts (B, T) of int64",
    )
    most = before.seq_len + 1
    require(2 <= tokens.shape[1] <= most, f"{what} must have 2 to {most} tokens in each text")
    low, high = int(tokens.min()), int(tokens.max())
    require(
        low >= 0 and high < before.vocab_size,
        f"tokens from {low} to {high} are not all in a vocabulary of {before.vocab_size}",
    )


def block_match(before: View, after: View) -> list[int | None]:
    """For each layer of the later model the one of the earlier that it is, None for a new one: of
    all ways that keep their order, the one in which the fewest tokens are routed otherwise."""
    old_layers, new_layers = before.chosen_BLTC.unbind(1), after.chosen_BLTC.unbind(1)

    @cache
    def best(new: int, old: int) -> tuple[int, list[int | None]]:
        """Flips, and the match of the first `old` layers among the first `new`."""
        if not old:
            return 0, [None] * new
        flips, match = best(new - 1, old - 1)
        flips += int((new_layers[new - 1] != old_layers[old - 1]).any(-1).sum())
        ways = [(flips, [*match, old - 1])]
        if new > old:
            flips, match = best(new - 1, old)
            ways.append((flips, [*match, None]))
        return min(ways, key=lambda way: way[0])

    return best(len(new_layers), len(old_layers))[1]

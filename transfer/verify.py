"""Whether one model computes the function of another: for models in hand, without a plan."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from config import Deepen, ModelConfig, Tolerance, require
from models import SLM
from transfer.checks import (
    FunctionDrift,
    GrowthError,
    broken_limits,
    compare_twice,
    load_extremes,
    resolve_tolerance,
    rounding_drift,
    run_twice,
)
from transfer.probe import ProbeOutput

ASSUMED_ROUNDINGS = 2.0
"""How often the weights of a grown model may have been rounded: once, with noise as large as they
are."""


def verify(
    before: SLM,
    after: SLM,
    tokens_BT: Tensor,
    max_logit_drift: float | None = None,
    max_loss_drift: float | None = None,
) -> FunctionDrift:
    """Measures how far `after`, grown out of `before` by any operators, is from it. Both models are
    judged on their own device, in float64 where it has it.

    Args:
        before: The small model.
        after: The grown model.
        tokens_BT: Texts, int64, of 2 to seq_len + 1 tokens, each of which is predicted from those
            before it.
        max_logit_drift: Largest |logit difference| allowed. None takes what rounding the weights to
            float32 may do, measured on `before`.
        max_loss_drift: Largest change of the mean loss allowed, in nats. None takes twice that.

    Raises:
        GrowthError: if a limit is exceeded; its `drift` holds what was measured.
        InputError: if the models or the tokens do not belong together.
    """
    check_comparable(before.config, after.config, tokens_BT)
    # Growing by nothing is held to these limits and to none of its own.
    nothing = Deepen(0, tolerance=Tolerance(max_logit_drift, max_loss_drift))
    old, new = (
        run_twice(model, tokens_BT.to(model.norm.weight.device)) for model in (before, after)
    )
    device = before.norm.weight.device
    by_rounding = rounding_drift(before, tokens_BT.to(device), old[0], ASSUMED_ROUNDINGS)
    logit_limit, loss_limit = resolve_tolerance(nothing, by_rounding.logit)
    new = (new[0].to(device), new[1].to(device))
    same_experts = before.config.num_experts == after.config.num_experts
    if not (same_experts and before.config.top_k == after.config.top_k):
        # The choices of one model say nothing about those of the other.
        old = (old[0].without_routing(), old[1].without_routing())
    drift = compare_twice(old, new, match_blocks(old[0], new[0]))
    load = load_extremes(new[0], after.config.num_experts)
    limits = {"logit_limit": logit_limit, "margin_limit": by_rounding.margin}
    drift = replace(drift, **limits, **load)
    if broken := broken_limits(drift, loss_limit):
        raise GrowthError(f"the models are not the same function: {'; '.join(broken)}", drift)
    return drift


def check_comparable(before: ModelConfig, after: ModelConfig, tokens: Tensor) -> None:
    """Raises InputError unless both models can read `tokens` and one may have grown out of the
    other."""
    for name in ("vocab_size", "seq_len"):
        old, new = getattr(before, name), getattr(after, name)
        require(old == new, f"after.{name} = {new} is not before.{name} = {old}")
    require(
        before.n_layers <= after.n_layers,
        f"after.n_layers = {after.n_layers} is less than before's {before.n_layers}",
    )
    given = f"tokens = a {tuple(tokens.shape)} tensor of {str(tokens.dtype).removeprefix('torch.')}"
    require(
        tokens.dtype == torch.int64 and tokens.dim() == 2 and len(tokens) > 0,
        f"{given} must be texts (B, T) of int64",
    )
    longest = before.seq_len + 1
    require(
        2 <= tokens.shape[1] <= longest, f"{given} must have 2 to {longest} tokens in each text"
    )
    low, high = int(tokens.min()), int(tokens.max())
    require(
        low >= 0 and high < before.vocab_size,
        f"tokens from {low} to {high} are not all in a vocabulary of {before.vocab_size}",
    )


def match_blocks(before: ProbeOutput, after: ProbeOutput) -> list[int | None]:
    """Returns for each layer of the later model the layer of the earlier one that it is, None for a
    new one: of all matches that keep the order, the one that flips the routing of the fewest
    tokens."""
    old_layers, new_layers = before.expert_ids_BLTC.unbind(1), after.expert_ids_BLTC.unbind(1)

    @cache
    def best_match(new: int, old: int) -> tuple[int, list[int | None]]:
        """Returns the flips and the match of the first `old` layers among the first `new`."""
        if not old:
            return 0, [None] * new
        flips, match = best_match(new - 1, old - 1)
        flips += int((new_layers[new - 1] != old_layers[old - 1]).any(-1).sum())
        candidates = [(flips, [*match, old - 1])]
        if new > old:
            flips, match = best_match(new - 1, old)
            candidates.append((flips, [*match, None]))
        return min(candidates, key=lambda candidate: candidate[0])

    return best_match(len(new_layers), len(old_layers))[1]

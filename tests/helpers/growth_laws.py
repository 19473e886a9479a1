"""The laws that every growth keeps, as assertions on the states before and after it."""

from typing import Any

import torch
from torch import Tensor

from config import Growth
from tests.helpers.small_models import gradients, logits
from transfer import TrainState, apply_plan, make_plan
from transfer.plan import Plan, Tile


def grow_with_plan(old: TrainState, growth: Growth, **options: Any) -> tuple[Plan, TrainState]:
    """Returns the plan of a growth, and the state that it leads to."""
    config, plan = make_plan(old.config, growth)
    return plan, apply_plan(config, plan, old, **options)


def grow_by(state: TrainState, *growths: Growth) -> TrainState:
    """Returns the state after one growth after the other."""
    for growth in growths:
        _, state = grow_with_plan(state, growth)
    return state


def add_up_copies(new: Tensor, row: Tile, old: Tensor) -> Tensor:
    """Returns the gradient of an old weight by the chain rule: those of its copies, times their
    scale, added up."""
    for dim, times in enumerate(row.repeats):
        new = new.unflatten(dim, (times, -1)).sum(dim)
    return row.scale * new.view_as(old)


def assert_function_is_kept(old: TrainState, new: TrainState, tolerance: float = 1e-10) -> None:
    """Asserts that both models have the same logits."""
    torch.testing.assert_close(logits(new), logits(old), rtol=0, atol=tolerance)


def assert_gradients_add_up(old: TrainState, plan: Plan, new: TrainState) -> None:
    """Asserts that the gradients of the new model are those of the old one by the chain rule. The
    old state's first moments are its gradients."""
    grads = gradients(new)
    for name, row in plan.items():
        if isinstance(row, Tile):
            target = old.adam[row.source]["exp_avg"]
            result = add_up_copies(grads[name], row, target)
            torch.testing.assert_close(result, target, rtol=1e-9, atol=1e-12)


def assert_moments_are_shares(old: TrainState, plan: Plan, new: TrainState) -> None:
    """Asserts that first moments are equal shares that add up to the old ones, and that second
    moments are their squares, as those of `old` are, times the experts for each chosen one where
    they are those of experts."""
    tiles = {name: row for name, row in plan.items() if isinstance(row, Tile)}
    assert new.adam.keys() == tiles.keys()
    for name, row in tiles.items():
        before, after = old.adam[row.source], new.adam[name]
        assert after["step"] == before["step"]
        exp_avg = add_up_copies(after["exp_avg"], row, before["exp_avg"])
        torch.testing.assert_close(exp_avg, before["exp_avg"])
        expected = row.sparsity * after["exp_avg"].square()
        torch.testing.assert_close(after["exp_avg_sq"], expected)

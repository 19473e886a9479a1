"""What a model makes of a probe, in its own precision, but at least float32, with autocast off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import SLM


class View(NamedTuple):
    """What a model makes of a probe of B windows."""

    logits_BTV: Tensor
    """On the CPU: two of these would be the most of what a growth needs on a GPU."""
    loss_BT: Tensor
    chosen_BLTC: Tensor
    """Experts of each token in each mixture-of-experts layer, ascending."""

    @classmethod
    def of_one(cls, logits_1TV: Tensor, window: Tensor, chosen: list[Tensor]) -> "View":
        """Of one window (1, T + 1); `chosen` (T, C) of each layer, in any order."""
        loss_T = F.cross_entropy(logits_1TV[0], window[0, 1:], reduction="none")
        layers = [chosen_TC.sort(-1).values for chosen_TC in chosen]
        nothing = window.new_empty(0, window.shape[1] - 1, 0)
        chosen_LTC = torch.stack(layers) if layers else nothing
        return cls(logits_1TV.cpu(), loss_T[None], chosen_LTC[None])

    @classmethod
    def of_all(cls, views: list["View"]) -> "View":
        return cls(*(torch.cat(parts) for parts in zip(*views, strict=True)))


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Float32 products in float32, whatever the run has chosen for training."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


@contextmanager
def raised(model: SLM) -> Iterator[None]:
    """Weights of less than float32 are raised to it where they are used, a block at a time."""
    kept: dict[nn.Module, list[Tensor]] = {}

    def up(module: nn.Module, *_: object) -> None:
        kept[module] = [weight.data for weight in module.parameters()]
        module.float()

    def down(module: nn.Module, *_: object) -> None:
        for weight, data in zip(module.parameters(), kept.pop(module), strict=True):
            weight.data = data

    if model.norm.weight.dtype.itemsize >= torch.float32.itemsize:
        yield
        return
    others = [part for name, part in model.named_children() if name != "blocks"]
    hooks = [block.register_forward_pre_hook(up) for block in model.blocks]
    hooks += [block.register_forward_hook(down) for block in model.blocks]
    try:
        for part in others:
            up(part)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(kept):
            down(module)


@torch.no_grad()
def look(model: SLM, probe_BS: Tensor) -> View:
    """What `model` makes of windows (B, T + 1), one window at a time to spare memory."""
    with exact_matmul(), raised(model), torch.autocast(probe_BS.device.type, enabled=False):
        return View.of_all([look_at_one(model, window) for window in probe_BS.split(1)])


def look_at_one(model: SLM, window: Tensor) -> View:
    """What `model` makes of one window (1, T + 1)."""
    out = model(window[:, :-1])
    return View.of_one(out.logits, window, [layer.chosen_NC for layer in out.routing])

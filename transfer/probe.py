"""What a model computes on the probe batch, in its own precision but at least float32, with
autocast off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import SLM


class ProbeOutput(NamedTuple):
    """What a model computes on a probe of B windows of T + 1 tokens."""

    logits_BTV: Tensor
    """On the CPU: two of these would be most of what a growth needs on a GPU."""
    loss_BT: Tensor
    expert_ids_BLTC: Tensor
    """Experts of each token in each mixture-of-experts layer, ascending."""

    @classmethod
    def from_window(
        cls, logits_1TV: Tensor, window: Tensor, expert_ids: list[Tensor]
    ) -> "ProbeOutput":
        """Returns the output of one window (1, T + 1), given its logits and the experts (T, C) of
        each layer in any order."""
        loss_T = F.cross_entropy(logits_1TV[0], window[0, 1:], reduction="none")
        layers = [ids_TC.sort(-1).values for ids_TC in expert_ids]
        no_layer = window.new_empty(0, window.shape[1] - 1, 0)
        expert_ids_LTC = torch.stack(layers) if layers else no_layer
        return cls(logits_1TV.cpu(), loss_T[None], expert_ids_LTC[None])

    @classmethod
    def concatenate(cls, outputs: list["ProbeOutput"]) -> "ProbeOutput":
        """Returns the outputs of several windows as one."""
        return cls(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))


@contextmanager
def exact_matmul() -> Iterator[None]:
    """Computes float32 products in float32, whatever is set for training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def promoted_to_float32(model: SLM) -> Iterator[None]:
    """Promotes weights of less than float32 while they are used, one block at a time."""
    originals: dict[nn.Module, list[Tensor]] = {}

    def promote(module: nn.Module, *_: object) -> None:
        originals[module] = [weight.data for weight in module.parameters()]
        module.float()

    def restore(module: nn.Module, *_: object) -> None:
        for weight, data in zip(module.parameters(), originals.pop(module), strict=True):
            weight.data = data

    if model.norm.weight.dtype.itemsize >= torch.float32.itemsize:
        yield
        return
    others = [part for name, part in model.named_children() if name != "blocks"]
    hooks = [block.register_forward_pre_hook(promote) for block in model.blocks]
    hooks += [block.register_forward_hook(restore) for block in model.blocks]
    try:
        for part in others:
            promote(part)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(originals):
            restore(module)


@torch.no_grad()
def run_probe(model: SLM, probe_BS: Tensor) -> ProbeOutput:
    """Returns what `model` computes on windows (B, T + 1), one at a time to save memory."""
    autocast_off = torch.autocast(probe_BS.device.type, enabled=False)
    with exact_matmul(), promoted_to_float32(model), autocast_off:
        return ProbeOutput.concatenate([run_window(model, window) for window in probe_BS.split(1)])


def run_window(model: SLM, window: Tensor) -> ProbeOutput:
    """Returns what `model` computes on one window (1, T + 1)."""
    out = model(window[:, :-1])
    expert_ids = [layer.expert_ids_NC for layer in out.routing]
    return ProbeOutput.from_window(out.logits, window, expert_ids)

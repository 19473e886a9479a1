"""Between a State at rest and a model with its optimizer at work."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from config import Growth, TrainingConfig
from models import SLM, fused
from transfer import Rates, State, rates
from transfer.rates import Own


class Optimizer(Protocol):
    """AdamW with what it trains. A step takes the gradients of the model's parameters, clips and
    drops them, and returns their norm; where that is not finite it changes nothing."""

    model: SLM

    def set_lr(self, lr: float) -> None: ...
    def step(self) -> Tensor: ...
    def weights(self) -> Mapping[str, Tensor]:
        """By name, in float32: the very ones, or put together when asked for. The next step changes
        them."""
        ...

    def snapshot(self) -> State:
        """What `rest` would give, to be written down at once: the next step changes what is in it.
        Its weights may be on the CPU."""
        ...

    def rest(self) -> State:
        """What it has become. The optimizer and its model are of no use after that."""
        ...


def home(state: State, settings: TrainingConfig, device: torch.device) -> State:
    """`state` where it lies between phases; lean, Adam's memory is not on the GPU then."""
    return state.to(device, adam=torch.device("cpu") if settings.lean else device)


def wake(
    state: State, settings: TrainingConfig, dtype: torch.dtype, growth: Sequence[Growth] = ()
) -> Optimizer:
    """An optimizer around the tensors of `state`, or in their place, with the memory it had.
    `growth` is what the model has been through."""
    device = next(iter(state.weights.values())).device
    paces = rates(state.weights, growth if settings.lr_scaling == "width" else ())
    if settings.lean:
        from utils.lean import Lean

        return Lean(state, settings, paces)
    if fused.available(device, dtype):
        from utils.masters import Masters

        return Masters(state, settings, paces)
    return Plain(state, settings, paces)


class Plain:
    """Torch's own AdamW, on weights that are also what the model computes with."""

    def __init__(self, state: State, settings: TrainingConfig, rates: Rates):
        self.model, self.grad_clip = state.model(), settings.grad_clip
        named = dict(self.model.named_parameters())
        groups: dict[Own, list[Tensor]] = {}
        for name, p in named.items():
            groups.setdefault(rates[name].own(settings, p), []).append(p)
        self.adamw = torch.optim.AdamW(
            [{"params": params, **own._asdict()} for own, params in groups.items()],
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )
        for name, moments in state.adam.items():
            self.adamw.state[named[name]] = moments

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["pace"]

    def step(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(grads)
        over = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0)
        # The fused kernel divides by the one, and leaves everything as it is where the other is 1,
        # so that no host has to look first and no pass be made; that for MPS does neither.
        if norm.device.type != "mps":
            self.adamw.grad_scale = over.float()  # pyright: ignore
            self.adamw.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore
            self.adamw.step()
        elif norm.isfinite():
            for grad in grads:
                grad.div_(over)
            self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor]:
        return State.of(self.model).weights

    def snapshot(self) -> State:
        return self.rest()

    def rest(self) -> State:
        state = State.of(self.model)
        for name, weight in self.model.named_parameters():
            if weight in self.adamw.state:
                state.adam[name] = self.adamw.state[weight]
        return state


def total_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean, of all together: by rows first, since torch sums up a whole tensor on one core."""
    rows = [torch.linalg.vector_norm(grad.reshape(-1, grad.shape[-1]), dim=-1) for grad in grads]
    return torch.linalg.vector_norm(torch.cat(rows))

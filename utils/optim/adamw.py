"""Builds the optimizer for a TrainState: torch's AdamW, AdamW on float32 master weights of a bf16
copy, or 8-bit FlashAdamW."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from config import Growth, ModelConfig, TrainingConfig
from models import SLM
from models.ops import fused_kernels_available
from transfer import AdamWScale, AdamWScales, TrainState, adamw_scales
from transfer.lr_scaling import ParamSettings
from transfer.plan import param_shapes
from utils.optim.grad_norm import global_norm


class Optimizer(Protocol):
    """AdamW together with the model that it trains."""

    model: SLM

    def set_lr(self, lr: float) -> None:
        """Sets the schedule's learning rate for the next steps."""
        ...

    def step(self) -> Tensor:
        """Clips the gradients of the model's parameters, takes one step and drops them. Returns
        their norm before clipping, in which copies count as `AdamWScale.norm_weight` says; if that
        is not finite, nothing changes."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the float32 weights by name: the very tensors, or put together when asked for.
        The next step changes them."""
        ...

    def snapshot(self) -> TrainState:
        """Returns the state to be written down at once: the next step changes what is in it. Its
        weights may be on the CPU."""
        ...

    def into_train_state(self) -> TrainState:
        """Returns the state that training has reached. The optimizer and its model are of no use
        after that."""
        ...


def place_state(state: TrainState, training: TrainingConfig, device: torch.device) -> TrainState:
    """Returns `state` where it lies between phases: on `device`, Adam's part on the CPU where
    memory is low."""
    return state.to(device, adam=torch.device("cpu") if training.low_memory else device)


def build_optimizer(
    state: TrainState,
    training: TrainingConfig,
    dtype: torch.dtype,
    growth_history: Sequence[Growth] = (),
) -> Optimizer:
    """Builds an optimizer around the tensors of `state`, or in their place, with its Adam state.

    Args:
        state: The model and Adam's state. An optimizer other than torch's consumes it.
        training: How to train.
        dtype: The dtype of the training step's products.
        growth_history: Every operator that the model has been through.
    """
    device = next(iter(state.weights.values())).device
    scales = param_scales(state.weights, training, growth_history)
    if training.low_memory:
        from utils.optim.flash_adamw import LowMemoryAdamW

        return LowMemoryAdamW(state, training, scales)
    if training.fused_kernels and fused_kernels_available(state.config, device, dtype):
        from utils.optim.master_weights import MasterWeightAdamW

        return MasterWeightAdamW(state, training, scales)
    return TorchAdamW(state, training, scales)


def param_scales(
    names: Iterable[str], training: TrainingConfig, growth_history: Sequence[Growth]
) -> AdamWScales:
    """Returns the factors on AdamW's settings for parameters of a model that has been through
    `growth_history`. Where rates are not scaled, the norm still is what it was before widening."""
    scales = adamw_scales(names, growth_history)
    if training.lr_scaling == "width":
        return scales
    return {name: AdamWScale(norm_weight=scale.norm_weight) for name, scale in scales.items()}


def lr_scale_range(
    config: ModelConfig, training: TrainingConfig, growth_history: Sequence[Growth]
) -> tuple[float, float]:
    """Returns the lowest and the highest factor on the schedule's learning rate that a parameter of
    a model of `config` has."""
    scales = param_scales(param_shapes(config), training, growth_history)
    factors = [scale.lr for scale in scales.values()]
    return min(factors), max(factors)


class TorchAdamW:
    """Torch's own AdamW, on weights that are also what the model computes with."""

    def __init__(self, state: TrainState, training: TrainingConfig, scales: AdamWScales):
        self.model, self.grad_clip = state.model(), training.grad_clip
        self.model.fused_kernels = training.fused_kernels
        params = dict(self.model.named_parameters())
        groups: dict[ParamSettings, list[Tensor]] = {}
        for name, param in params.items():
            groups.setdefault(scales[name].settings(training, param), []).append(param)
        self.norm_weights = [scales[name].norm_weight for name in params]
        self.adamw = torch.optim.AdamW(
            [{"params": group, **settings._asdict()} for settings, group in groups.items()],
            betas=(training.beta1, training.beta2),
            fused=True,
        )
        for name, moments in state.adam.items():
            self.adamw.state[params[name]] = moments

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def step(self) -> Tensor:
        weighted = zip(self.model.parameters(), self.norm_weights, strict=True)
        grads, weights = zip(*((p.grad, w) for p, w in weighted if p.grad is not None), strict=True)
        norm = global_norm(grads, weights)
        divisor = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0)
        # The fused kernel divides gradients by grad_scale, and leaves everything as it is where
        # found_inf is 1, so that the host need not wait for the norm. On MPS it does neither.
        if norm.device.type != "mps":
            self.adamw.grad_scale = divisor.float()  # pyright: ignore
            self.adamw.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore
            self.adamw.step()
        elif norm.isfinite():
            for grad in grads:
                grad.div_(divisor)
            self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def weights(self) -> dict[str, Tensor]:
        return TrainState.from_model(self.model).weights

    def snapshot(self) -> TrainState:
        return self.into_train_state()

    def into_train_state(self) -> TrainState:
        state = TrainState.from_model(self.model)
        for name, weight in self.model.named_parameters():
            if weight in self.adamw.state:
                state.adam[name] = self.adamw.state[weight]
        return state

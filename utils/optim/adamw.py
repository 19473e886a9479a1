"""Builds the optimizer for a TrainState: torch's AdamW, AdamW on float32 master weights of a bf16
copy, or 8-bit FlashAdamW."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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
    """Torch's own AdamW, on weights that are also what the model computes with. (Torch's optimizer
    class does the same by the same function, but loads torch's compiler: a second of every start.)
    """

    def __init__(self, state: TrainState, training: TrainingConfig, scales: AdamWScales):
        self.model, self.training, self.lr = state.model(), training, 0.0
        self.model.fused_kernels = training.fused_kernels
        self.params, self.adam = dict(self.model.named_parameters()), dict(state.adam)
        self.groups: dict[ParamSettings, list[str]] = {}
        """Names of the parameters that have the same settings."""
        for name, param in self.params.items():
            self.groups.setdefault(scales[name].settings(training, param), []).append(name)
        self.norm_weights = [scales[name].norm_weight for name in self.params]

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def step(self) -> Tensor:
        weighted = zip(self.params.values(), self.norm_weights, strict=True)
        grads, weights = zip(*((p.grad, w) for p, w in weighted if p.grad is not None), strict=True)
        norm = global_norm(grads, weights)
        divisor = ((norm + 1e-6) / self.training.grad_clip).clamp(min=1.0)
        # The fused kernel divides gradients by its first scale, and leaves everything as it is
        # where the second is 1, so that the host need not wait for the norm. On MPS it does
        # neither.
        if norm.device.type != "mps":
            self.update(divisor.float(), norm.isfinite().logical_not().float())
        elif norm.isfinite():
            for grad in grads:
                grad.div_(divisor)
            self.update(None, None)
        self.model.zero_grad()
        return norm

    @torch.no_grad()
    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Updates every parameter that has a gradient."""
        for settings, names in self.groups.items():
            params, grads, moments = [], [], []
            for name in names:
                param = self.params[name]
                if param.grad is None:
                    continue
                if name not in self.adam:
                    self.adam[name] = fresh_moments(param.detach())
                params.append(param)
                grads.append(param.grad)
                moments.append(self.adam[name])
            adamw(
                params,
                grads,
                exp_avgs=[each["exp_avg"] for each in moments],
                exp_avg_sqs=[each["exp_avg_sq"] for each in moments],
                max_exp_avg_sqs=[],
                state_steps=[each["step"] for each in moments],
                fused=True,
                grad_scale=grad_scale,
                found_inf=found_inf,
                amsgrad=False,
                maximize=False,
                beta1=self.training.beta1,
                beta2=self.training.beta2,
                lr=self.lr * settings.lr_scale,
                weight_decay=settings.weight_decay,
                eps=settings.eps,
            )

    def weights(self) -> dict[str, Tensor]:
        return TrainState.from_model(self.model).weights

    def snapshot(self) -> TrainState:
        return self.into_train_state()

    def into_train_state(self) -> TrainState:
        names = [name for name in self.params if name in self.adam]
        adam = {name: self.adam[name] for name in names}
        return TrainState(self.model.config, self.weights(), adam)


def fresh_moments(weight: Tensor) -> dict[str, Tensor]:
    """Returns Adam's state of a parameter that is new to it."""
    return {
        "step": weight.new_zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
    }

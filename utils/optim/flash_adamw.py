"""AdamW in 7 bytes a parameter: bf16 weights with 8 more bits each, 8-bit moments (flashoptim).

Between phases everything is float32: weights on the GPU, Adam's state on the CPU.
"""

from dataclasses import replace

import torch
from flashoptim import FlashAdamW, compute_ecc_bits, reconstruct_fp32_param
from flashoptim.optimizers import _MaybeQuantizedTensor
from torch import Tensor

from config import TrainingConfig
from models.layerwise import LazyTensors
from transfer import AdamWScale, AdamWScales, TrainState
from transfer.lr_scaling import ParamSettings
from utils.optim.grad_norm import global_norm
from utils.optim.master_weights import working_copy
from utils.runtime.device import on_cpu

GRAD_SCALE = 1024.0
"""Factor on gradients and eps, which AdamW does not notice: the library keeps its scales in
float16, where the small gradients of a large model would vanish."""
QUANTIZATION = {
    "exp_avg": {"signed": True, "softsign": True},
    "exp_avg_sq": {"signed": False, "sqrt": True, "softsign": False},
}
"""How the library itself compresses each moment."""


class LowMemoryAdamW:
    """AdamW made of a TrainState, whose weights are gone after that. The gradients of micro-batches
    add up in bf16, because float32 would take 2 bytes a parameter more."""

    def __init__(self, state: TrainState, training: TrainingConfig, scales: AdamWScales):
        self.config, self.grad_clip = state.config, training.grad_clip
        self.model, self.copies = working_copy(state)
        self.leaves = list(self.model.parameters())
        self.views: list[dict[str, Tensor]] = [
            {name: view for name, (leaf, view) in self.copies.items() if leaf is of}
            for of in self.leaves
        ]
        # What lies side by side in a leaf has the same axes, and so the same scale.
        leaf_scales = [scales[next(iter(views))] for views in self.views]
        self.norm_weights = [scale.norm_weight for scale in leaf_scales]
        self.adamw = FlashAdamW(
            param_groups(self.leaves, leaf_scales, training),
            betas=(training.beta1, training.beta2),
            master_weight_bits=24,
        )
        for leaf, views in zip(self.leaves, self.views, strict=True):
            leaf_state = self.adamw.state[leaf]
            if leaf.dtype == torch.bfloat16:
                masters = {name: state.weights.pop(name) for name in views}
                whole = join_views(leaf, views, masters)
                leaf_state["error_bits"] = compute_ecc_bits(whole, leaf.detach(), 3)
            if all(name in state.adam for name in views):
                moments = [state.adam[name] for name in views]
                leaf_state["step"] = torch.tensor(int(moments[0]["step"]), dtype=torch.int64)
                for power, (kind, options) in enumerate(QUANTIZATION.items(), 1):
                    old = {name: state.adam[name][kind] for name in views}
                    leaf_state[kind] = _MaybeQuantizedTensor(
                        join_views(leaf, views, old) * GRAD_SCALE**power,
                        try_quantize=leaf.dtype == torch.bfloat16,
                        storage_dtype=leaf.dtype,
                        **options,
                    )

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def step(self) -> Tensor:
        # The host waits for the norm: the library has no other way to leave everything as it was.
        grads = [leaf.grad for leaf in self.leaves]
        norm = global_norm(grads, self.norm_weights)
        if norm.isfinite():
            factor = GRAD_SCALE * (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(factor)
            self.adamw.step()
        self.model.zero_grad()
        return norm

    def weights(self) -> LazyTensors:
        return LazyTensors([*self.copies], self.master)

    def master(self, name: str) -> Tensor:
        """Returns a weight in float32: reconstructed, or the very tensor if it is trained so."""
        leaf, view = self.copies[name]
        bits = self.adamw.state[leaf].get("error_bits")
        return view if bits is None else reconstruct_fp32_param(view, view_of(bits, view))

    def snapshot(self) -> TrainState:
        return self.into_train_state()

    def into_train_state(self) -> TrainState:
        # On the CPU, so that it needs no room on the GPU.
        weights = on_cpu(self.weights())
        adam = {name: {} for name in weights}
        for leaf, views in zip(self.leaves, self.views, strict=True):
            leaf_state = self.adamw.state[leaf]
            if "step" in leaf_state:
                for name in views:
                    adam[name]["step"] = torch.tensor(float(leaf_state["step"]))
                for power, kind in enumerate(QUANTIZATION, 1):
                    moment = leaf_state[kind].materialize().float() / GRAD_SCALE**power
                    for name, view in views.items():
                        adam[name][kind] = view_of(moment, view).contiguous().cpu()
        return TrainState(self.config, weights, {name: m for name, m in adam.items() if m})


def param_groups(
    leaves: list[Tensor], scales: list[AdamWScale], training: TrainingConfig
) -> list[dict]:
    """Returns the optimizer's parameter groups. What is in float32 stays in float32: a gain near 1
    has updates below what 24 bits keep."""
    scaled = replace(training, eps=GRAD_SCALE * training.eps)
    groups: dict[tuple[ParamSettings, bool], list[Tensor]] = {}
    for leaf, scale in zip(leaves, scales, strict=True):
        key = scale.settings(scaled, leaf), leaf.dtype == torch.bfloat16
        groups.setdefault(key, []).append(leaf)
    return [
        {"params": params, **settings._asdict(), **({} if is_bf16 else {"quantize": False})}
        for (settings, is_bf16), params in groups.items()
    ]


def join_views(leaf: Tensor, views: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Returns a float32 tensor like `leaf` with each parameter's values where its view lies."""
    whole = torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False)
    for name, view in views.items():
        view_of(whole, view).copy_(values[name])
    return whole


def view_of(whole: Tensor, view: Tensor) -> Tensor:
    """Returns the part of `whole`, which is shaped like a leaf, that `view` is of the leaf."""
    return whole.as_strided(view.shape, view.stride(), view.storage_offset())

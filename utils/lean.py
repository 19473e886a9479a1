"""AdamW in 7 bytes a parameter: bf16 weights with 8 more bits of each, 8-bit moments (FlashOptim).

At rest everything is float32, as ever: weights on the GPU, Adam's memory on the CPU.
"""

from dataclasses import replace

import torch
from flashoptim import FlashAdamW, compute_ecc_bits, reconstruct_fp32_param
from flashoptim.optimizers import _MaybeQuantizedTensor
from torch import Tensor

from config import TrainingConfig
from transfer import Rate, Rates, State
from transfer.rates import Own
from utils.device import on_cpu
from utils.masters import working_copy
from utils.streamed import Lazy

SCALE = 1024.0
"""Of gradients and eps, which AdamW does not notice; the library keeps its scales in float16, where
the small gradients of a large model would vanish."""
KINDS = {
    "exp_avg": {"signed": True, "softsign": True},
    "exp_avg_sq": {"signed": False, "sqrt": True, "softsign": False},
}
"""How the library itself compresses each moment."""


class Lean:
    """An optimizer made of a State, whose weights are gone after that. With micro-batches the
    gradients add up in bf16."""

    def __init__(self, state: State, settings: TrainingConfig, rates: Rates):
        self.config, self.grad_clip = state.config, settings.grad_clip
        self.model, self.copies = working_copy(state)
        self.leaves = list(self.model.parameters())
        self.parts: list[dict[str, Tensor]] = [
            {name: part for name, (leaf, part) in self.copies.items() if leaf is of}
            for of in self.leaves
        ]
        # What lies side by side in a leaf has the same axes, and so the same rates.
        paces = [rates[next(iter(parts))] for parts in self.parts]
        self.adamw = FlashAdamW(
            groups(self.leaves, paces, settings),
            betas=(settings.beta1, settings.beta2),
            master_weight_bits=24,
        )
        for leaf, parts in zip(self.leaves, self.parts, strict=True):
            kept = self.adamw.state[leaf]
            if leaf.dtype == torch.bfloat16:
                masters = {name: state.weights.pop(name) for name in parts}
                kept["error_bits"] = compute_ecc_bits(
                    joined(leaf, parts, masters), leaf.detach(), 3
                )
            if all(name in state.adam for name in parts):
                moments = [state.adam[name] for name in parts]
                kept["step"] = torch.tensor(int(moments[0]["step"]), dtype=torch.int64)
                for power, (kind, how) in enumerate(KINDS.items(), 1):
                    old = {name: state.adam[name][kind] for name in parts}
                    kept[kind] = _MaybeQuantizedTensor(
                        joined(leaf, parts, old) * SCALE**power,
                        try_quantize=leaf.dtype == torch.bfloat16,
                        storage_dtype=leaf.dtype,
                        **how,
                    )

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["pace"]

    def step(self) -> Tensor:
        """As utils.optimizer.Optimizer says. The host waits for the norm: the library has no other
        way to leave everything as it was."""
        grads = [leaf.grad for leaf in self.leaves]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if norm.isfinite():
            scale = SCALE * (self.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale)
            self.adamw.step()
        self.model.zero_grad()
        return norm

    def weights(self) -> Lazy:
        return Lazy([*self.copies], self.master)

    def master(self, name: str) -> Tensor:
        """In float32; what is so at work, the very one."""
        leaf, part = self.copies[name]
        bits = self.adamw.state[leaf].get("error_bits")
        return part if bits is None else reconstruct_fp32_param(part, place(bits, part))

    def snapshot(self) -> State:
        return self.rest()

    def rest(self) -> State:
        """On the CPU, so that it needs no room on the GPU."""
        weights = on_cpu(self.weights())
        adam = {name: {} for name in weights}
        for leaf, parts in zip(self.leaves, self.parts, strict=True):
            kept = self.adamw.state[leaf]
            if "step" in kept:
                for name in parts:
                    adam[name]["step"] = torch.tensor(float(kept["step"]))
                for power, kind in enumerate(KINDS, 1):
                    moment = kept[kind].materialize().float() / SCALE**power
                    for name, value in taken(moment, parts).items():
                        adam[name][kind] = value
        remembered = {name: kept for name, kept in adam.items() if kept}
        return State(self.config, weights, remembered)


def groups(leaves: list[Tensor], paces: list[Rate], settings: TrainingConfig) -> list[dict]:
    """What is in float32 stays in float32: a gain near 1 has updates below what 24 bits keep."""
    scaled = replace(settings, eps=SCALE * settings.eps)
    found: dict[tuple[Own, bool], list[Tensor]] = {}
    for leaf, rate in zip(leaves, paces, strict=True):
        key = rate.own(scaled, leaf), leaf.dtype == torch.bfloat16
        found.setdefault(key, []).append(leaf)
    return [
        {"params": params, **own._asdict(), **({} if lowered else {"quantize": False})}
        for (own, lowered), params in found.items()
    ]


def joined(leaf: Tensor, parts: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Values of the parameters of a leaf, float32, where they lie in it."""
    whole = torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False)
    for name, part in parts.items():
        place(whole, part).copy_(values[name])
    return whole


def taken(whole: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: place(whole, part).contiguous().cpu() for name, part in parts.items()}


def place(whole: Tensor, part: Tensor) -> Tensor:
    """Where in a tensor shaped like a leaf that part of the leaf is."""
    return whole.as_strided(part.shape, part.stride(), part.storage_offset())

"""Training in bf16 from float32 masters: a copy of the model, cast once a step, computes; the fused
AdamW reads its gradients and writes masters, moments and copy in one pass."""

import torch
from torch import Tensor, nn

from config import TrainingConfig
from models import SLM, axes, outline
from models.fused.adamw import Own, Part, Table, joined, split
from models.fused.cross_entropy import pad_rows
from transfer import Rates, State
from utils.device import on_cpu
from utils.streamed import Lazy

EXACT = ("norm.weight", "router.weight", "position.weight")
"""Parameters that are computed with in float32 and so need no copy."""


class Masters:
    """AdamW over a State, whose weights are gone after that and whose moments change in place;
    `model` computes the gradients. With micro-batches these add up in bf16.
    """

    def __init__(self, state: State, settings: TrainingConfig, rates: Rates):
        self.settings, self.config = settings, state.config
        device = next(iter(state.weights.values())).device
        own = [rates[name].own(settings, master) for name, master in state.weights.items()]
        self.adam = {
            name: state.adam.get(name) or unmoved(master) for name, master in state.weights.items()
        }
        self.model, copies = working_copy(state)
        self.parts: dict[str, Part] = {}
        for name, (leaf, copy) in copies.items():
            low, moments = state.weights.pop(name), self.adam[name]
            if leaf.dtype == torch.bfloat16:
                nearest, low = split(low)
                copy.copy_(nearest)
            self.parts[name] = Part(low, moments["exp_avg"], moments["exp_avg_sq"], leaf, copy)
        parts = list(self.parts.values())
        self.tables = [
            Table({i: part for i, part in enumerate(parts) if part.leaf.dtype == dtype})
            for dtype in (torch.bfloat16, torch.float32)
        ]
        self.steps = torch.stack([kept["step"].to(device) for kept in self.adam.values()])
        pace, decay, eps = (torch.tensor(each, device=device) for each in zip(*own, strict=True))
        self.own = Own(pace, decay, eps)
        self.lr = torch.zeros((), device=device)

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)

    def step(self) -> Tensor:
        """One step from the leaves' gradients, which are then gone. Returns their norm; where that
        is not finite everything is left as it was."""
        self.grads = [table.grads() for table in self.tables]
        if not torch.cuda.is_current_stream_capturing():
            self.locate()
        norm = torch.cat([table.squares() for table in self.tables]).sum().sqrt()
        finite = norm.isfinite()
        clip = (self.settings.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        clip = torch.where(finite, clip, -1.0)
        self.steps += finite
        betas = self.settings.beta1, self.settings.beta2
        biases = [(1 - beta ** self.steps.double()).float() for beta in betas]
        for table in self.tables:
            table.step(betas, biases, self.own, self.lr, clip)
        self.model.zero_grad()
        return norm

    def locate(self) -> None:
        """Tells the device where the gradients lie; a captured step learns it after its capture."""
        for table, grads in zip(self.tables, self.grads, strict=True):
            table.locate(grads)

    def weights(self) -> Lazy:
        return Lazy([*self.parts], self.master)

    def master(self, name: str) -> Tensor:
        """In float32, put together; what the model computes with as it is, the very one."""
        part = self.parts[name]
        return joined(part.copy, part.low) if part.low.dtype == torch.int16 else part.low

    def snapshot(self) -> State:
        """The masters are on the CPU."""
        return State(self.config, on_cpu(self.weights()), self.moments())

    def rest(self) -> State:
        """Takes no more memory than the masters do: each leaf makes room for them."""
        by_leaf: dict[Tensor, list[str]] = {}
        for name, part in self.parts.items():
            by_leaf.setdefault(part.leaf, []).append(name)
        names, weights = list(self.parts), {}
        for leaf, own in by_leaf.items():
            weights |= {name: self.master(name) for name in own}
            for name in own:
                del self.parts[name]
            if leaf.dtype == torch.bfloat16:
                leaf.data = leaf.new_empty(0)
        return State(self.config, {name: weights[name] for name in names}, self.moments())

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """They change as the training goes on."""
        for step, moments in zip(self.steps, self.adam.values(), strict=True):
            moments["step"] = step.clone()
        return self.adam


def unmoved(master: Tensor) -> dict[str, Tensor]:
    """What Adam remembers of a parameter that is new to it."""
    return {
        "step": master.new_zeros(()),
        "exp_avg": torch.zeros_like(master),
        "exp_avg_sq": torch.zeros_like(master),
    }


def working_copy(state: State) -> tuple[SLM, dict[str, tuple[Tensor, Tensor]]]:
    """A model whose products are in bf16, with weights of one input side by side and tables padded
    to whole rows of the head's product; and by parameter the leaf it is in and its part there."""
    model = outline(state.config)
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name in getattr(module, "PACKED", ())]
        if names:
            masters = [state.weights[name] for name in names]
            module.packed = nn.Parameter(torch.cat([w.bfloat16() for w in masters], -2))
            parts = module.packed.detach().split([w.shape[-2] for w in masters], -2)
            copies |= {n: (module.packed, part) for n, part in zip(names, parts, strict=True)}
    for name, master in state.weights.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, last)
        if name not in copies:
            leaf = master if name.endswith(EXACT) else master.bfloat16()
            leaf = nn.Parameter(pad_rows(leaf) if axes(name)[0][0] == "vocab" else leaf)
            setattr(module, last, leaf)
            copies[name] = (leaf, leaf.detach()[: len(master)])
    return model, {name: copies[name] for name in state.weights}

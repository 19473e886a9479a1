"""Training in bf16 from float32 master weights: a bf16 copy of the model computes; the fused AdamW
reads its gradients and writes masters, moments and copy in one pass.

A master weight is not stored whole. It is the bf16 copy and 16 more bits:

    optimizer = MasterWeightAdamW(state, training, scales)   # takes the weights out of `state`
    optimizer.model.embed.weight.dtype                       # bfloat16
    optimizer.weights()["embed.weight"].dtype                # float32, put together when asked for
"""

import torch
from torch import Tensor, nn

from config import TrainingConfig
from models import SLM, axes, meta_model
from models.fused.adamw import ChunkTable, MasterPart, SettingTensors, join_master, split_master
from models.fused.cross_entropy import pad_rows
from models.layerwise import LazyTensors
from transfer import AdamWScales, TrainState
from utils.optim.adamw import fresh_moments
from utils.runtime.device import on_cpu

FLOAT32_PARAMS = ("norm.weight", "router.weight", "position.weight")
"""Parameters that are computed with in float32 and so need no bf16 copy."""


class MasterWeightAdamW:
    """AdamW over a TrainState, whose weights are gone after that and whose moments change in place.
    The gradients of micro-batches add up in float32."""

    def __init__(self, state: TrainState, training: TrainingConfig, scales: AdamWScales):
        self.training, self.config = training, state.config
        device = next(iter(state.weights.values())).device
        settings = [
            scales[name].settings(training, master) for name, master in state.weights.items()
        ]
        self.adam = {
            name: state.adam.get(name) or fresh_moments(master)
            for name, master in state.weights.items()
        }
        self.model, copies = working_copy(state)
        if training.micro_batch_size:
            for leaf in self.model.parameters():
                leaf.grad_dtype = torch.float32
        self.parts: dict[str, MasterPart] = {}
        for name, (leaf, copy) in copies.items():
            low, moments = state.weights.pop(name), self.adam[name]
            if leaf.dtype == torch.bfloat16:
                nearest, low = split_master(low)
                copy.copy_(nearest)
            exp_avg, exp_avg_sq = moments["exp_avg"], moments["exp_avg_sq"]
            self.parts[name] = MasterPart(low, exp_avg, exp_avg_sq, leaf, copy)
        parts = list(self.parts.values())
        self.tables = [
            ChunkTable({i: part for i, part in enumerate(parts) if part.leaf.dtype == dtype})
            for dtype in (torch.bfloat16, torch.float32)
        ]
        self.steps = torch.stack([moments["step"].to(device) for moments in self.adam.values()])
        columns = zip(*settings, strict=True)
        self.settings = SettingTensors(*(torch.tensor(each, device=device) for each in columns))
        norm_weights = torch.tensor([scales[n].norm_weight for n in self.parts], device=device)
        self.chunk_weights = torch.cat([norm_weights[table.owner] for table in self.tables])
        self.lr = torch.zeros((), device=device)

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)

    def step(self) -> Tensor:
        self.grads = [table.grad_addresses() for table in self.tables]
        if not torch.cuda.is_current_stream_capturing():
            self.locate_grads()
        squares = torch.cat([table.grad_squares() for table in self.tables])
        norm = (squares * self.chunk_weights).sum().sqrt()
        is_finite = norm.isfinite()
        clip = (self.training.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        clip = torch.where(is_finite, clip, -1.0)
        self.steps += is_finite
        betas = self.training.beta1, self.training.beta2
        biases = [(1 - beta ** self.steps.double()).float() for beta in betas]
        for table in self.tables:
            table.step(betas, biases, self.settings, self.lr, clip)
        self.model.zero_grad()
        return norm

    def locate_grads(self) -> None:
        """Tells the device where the gradients lie; a captured step learns it after its capture."""
        for table, grads in zip(self.tables, self.grads, strict=True):
            table.locate_grads(grads)

    def weights(self) -> LazyTensors:
        return LazyTensors([*self.parts], self.master)

    def master(self, name: str) -> Tensor:
        """Returns a master weight in float32: put together, or the very tensor if the model
        computes with it as it is."""
        part = self.parts[name]
        return join_master(part.copy, part.low) if part.low.dtype == torch.int16 else part.low

    def snapshot(self) -> TrainState:
        return TrainState(self.config, on_cpu(self.weights()), self.moments())

    def into_train_state(self) -> TrainState:
        # It takes no more memory than the masters do: each leaf makes room for them.
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
        return TrainState(self.config, {name: weights[name] for name in names}, self.moments())

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Returns Adam's state, which changes as the training goes on."""
        for step, moments in zip(self.steps, self.adam.values(), strict=True):
            moments["step"] = step.clone()
        return self.adam


def working_copy(state: TrainState) -> tuple[SLM, dict[str, tuple[Tensor, Tensor]]]:
    """Returns a model whose products are in bf16, with weights of one input packed side by side and
    tables padded to whole rows of the head's product; and for each parameter the leaf that it lies
    in and its view of that leaf."""
    model = meta_model(state.config)
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name in getattr(module, "PACKED", ())]
        if names:
            masters = [state.weights[name] for name in names]
            module.packed = nn.Parameter(torch.cat([w.bfloat16() for w in masters], -2))
            views = module.packed.detach().split([w.shape[-2] for w in masters], -2)
            copies |= {n: (module.packed, view) for n, view in zip(names, views, strict=True)}
    for name, master in state.weights.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, last)
        if name not in copies:
            leaf = master if name.endswith(FLOAT32_PARAMS) else master.bfloat16()
            leaf = nn.Parameter(pad_rows(leaf) if axes(name)[0][0] == "vocab" else leaf)
            setattr(module, last, leaf)
            copies[name] = (leaf, leaf.detach()[: len(master)])
    return model, {name: copies[name] for name in state.weights}

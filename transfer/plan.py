"""What a growth plan is, and carrying it out: the only tensor surgery in the project.

A plan has a row for every parameter of the bigger model: a `Tile` of an old parameter or `Fresh`.
The same rows grow the weights and Adam's moments.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from config import ModelConfig
from models import SLM, axes, initialise, outline

Adam = dict[str, dict[str, Tensor]]
"""Per parameter: step, exp_avg, exp_avg_sq."""
Shape = tuple[int, ...]


@dataclass
class State:
    """A model at rest: its configuration, weights by name, and Adam's memory by name."""

    config: ModelConfig
    weights: dict[str, Tensor]
    adam: Adam = field(default_factory=dict)

    @classmethod
    def of(cls, model: SLM) -> "State":
        """The model's own tensors, not copies of them, and nothing for Adam to remember."""
        return cls(model.config, {name: p.detach() for name, p in model.named_parameters()})

    def to(self, device: torch.device, adam: torch.device | None = None) -> "State":
        """With Adam's memory on a device of its own, where one is given."""

        def moved(tensors: dict[str, Tensor], where: torch.device) -> dict[str, Tensor]:
            return {name: tensor.to(where) for name, tensor in tensors.items()}

        moments = {name: moved(kept, adam or device) for name, kept in self.adam.items()}
        return State(self.config, moved(self.weights, device), moments)

    def model(self) -> SLM:
        """An SLM around these very tensors. Raises RuntimeError for a missing or misshapen one."""
        model = outline(self.config)
        model.load_state_dict(self.weights, assign=True)
        return model


class Tile(NamedTuple):
    """`new = old.tile(copies)`, divided by the copies of the input axis, because they get summed.

    The loss is kept, so by the chain rule the gradients of the copies, times that divisor's
    inverse, add up to the old gradient: each copy gets `share` of it, where the copies are alike.
    """

    source: str
    copies: tuple[int, ...]
    summed: bool = False
    """The last dimension is an input."""
    noise: float = 0.0
    """Relative to the weight's standard deviation; it cancels over the copied inputs."""
    forked: bool = False
    """The old parameter goes on elsewhere too. The function is then another, so that this copy's
    gradient is no share of the old one: Adam remembers nothing of it."""
    redrawn: float = 0.0
    """Share of the units that is drawn anew in each expert, along the dimension `units`."""
    units: int = 0

    @property
    def scale(self) -> float:
        """What the old values are multiplied by."""
        return 1 / self.copies[-1] if self.summed else 1.0

    @property
    def share(self) -> float:
        """Of the old gradient, what that of each copy is."""
        return 1 / (math.prod(self.copies) * self.scale)

    @property
    def same(self) -> bool:
        """Whether the new parameter is the old one, if it has its shape, and so its moments."""
        return math.prod(self.copies) == 1 and not self.redrawn and not self.forked

    def weight(self, old: Tensor, generator: torch.Generator) -> Tensor:
        """The new parameter; `generator` draws the noise. `old` is left as it was."""
        inputs = self.copies[-1]
        if not self.noise or not self.summed or inputs == 1:
            return self.spread(old, self.scale)
        old = old.contiguous()
        one, parts, whole = laid_out(self.copies, old.shape)
        start, std = old.view(one).squeeze(-2) * self.scale, old.std()
        new = old.new_empty(parts)
        copies = new.unbind(-2)
        # Contrasts spread one draw less than there are copies, so that their sum is zero, over
        # the variance of all but one.
        relative = self.scale * self.noise * (inputs / (inputs - 1)) ** 0.5
        for weights in contrasts(inputs):
            drawn = torch.empty_like(copies[0], memory_format=torch.contiguous_format)
            drawn.normal_(generator=generator)
            for i, weight in enumerate(weights):
                is_first = len(weights) == 2 or i == len(weights) - 1  # nothing is written yet
                so_far = start if is_first else copies[i]
                torch.addcmul(so_far, drawn, std, value=weight * relative, out=copies[i])
        return new.view(whole)

    def spread(self, old: Tensor, factor: float) -> Tensor:
        """`old.tile(copies) * factor` in one pass over the memory."""
        one, parts, whole = laid_out(self.copies, old.shape)
        return (old.contiguous().view(one).expand(parts) * factor).view(whole)

    def redraw(self, new: Tensor, generator: torch.Generator, lots: torch.Generator) -> None:
        """Draws that share anew, normal with the mean and the standard deviation of what was there
        (Drop-Upcycling, 2502.19261). `lots` picks the units of each expert; one that was seeded
        alike picks the same in every projection. Moments stay: they have the right size."""
        size = new.shape[self.units]
        for expert in new:
            units = torch.randperm(size, generator=lots, device=new.device)
            units = units[: round(self.redrawn * size)]
            old = expert.index_select(self.units - 1, units)
            drawn = torch.empty_like(old).normal_(generator=generator)
            drawn.mul_(old.std()).add_(old.mean())
            expert.index_copy_(self.units - 1, units, drawn)

    def moments(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adam's memory of the new parameter, from its memory of the old one. `step` is the old
        tensor itself, not a copy."""
        return {
            "step": old["step"],
            "exp_avg": self.spread(old["exp_avg"], self.share),
            "exp_avg_sq": self.spread(old["exp_avg_sq"], self.share**2),
        }

    def copies_of(self, new: Tensor) -> Tensor:
        """(output copies, *old shape): each copy of the outputs, its copied inputs summed. In a
        weight all of them equal the old one, whatever the noise."""
        sizes = [size // times for size, times in zip(new.shape, self.copies, strict=True)]
        parts = new.reshape([n for pair in zip(self.copies, sizes, strict=True) for n in pair])
        if self.summed:
            parts = parts.sum(-2)
        outputs = len(self.copies) - self.summed
        times = list(range(0, 2 * outputs, 2))
        return parts.movedim(times, list(range(outputs))).flatten(0, outputs - 1)

    def outputs_of(self, new: Tensor) -> Tensor:
        """(output copies, ...): each copy of the outputs as it is, with all of its inputs."""
        whole = (*self.copies[:-1], 1) if self.summed else self.copies
        return self._replace(copies=whole, summed=False).copies_of(new)


@cache
def laid_out(copies: tuple[int, ...], old: Shape) -> tuple[Shape, Shape, Shape]:
    """Shapes: the old one with two dimensions in place of each, one copy and its size; the same
    with all of the copies; and what these are the parts of."""
    sizes = (*[1] * (len(copies) - len(old)), *old)  # the dense one of experts
    pairs = list(zip(copies, sizes, strict=True))
    one = tuple(n for size in sizes for n in (1, size))
    return one, tuple(n for pair in pairs for n in pair), tuple(map(math.prod, pairs))


def contrasts(copies: int) -> list[list[float]]:
    """Helmert's: for each number above 1 up to `copies` the weights of so many terms, which sum to
    zero, their squares to one, and their products with those of another number to zero."""
    rows = []
    for terms in range(1, copies):
        length = (terms * (terms + 1)) ** 0.5
        rows.append([1 / length] * terms + [-terms / length])
    return rows


class Fresh(NamedTuple):
    """A parameter that comes from no old one. Adam remembers nothing of it: it warms up alone."""

    zero: bool = False
    """All zeros instead of the model's own initialisation."""
    scale: float = 1.0
    """Of that initialisation."""

    def weight(self, name: str, like: Tensor, n_layers: int, generator: torch.Generator) -> Tensor:
        """The new parameter, with `like`'s shape, device and dtype, in a model of `n_layers`."""
        new = torch.zeros_like(like)
        if not self.zero:
            initialise(name, new, n_layers, generator)
        return new.mul_(self.scale)


Row = Tile | Fresh
Plan = dict[str, Row]
Inspect = Callable[[str, Row, Tensor | None, Tensor], None]
"""Sees each parameter as it is made: name, row, the old parameter (None if fresh), the new one."""


def tile(
    name: str,
    source: str | None = None,
    noise: float = 0.0,
    forked: bool = False,
    redrawn: float = 0.0,
    **times: int,
) -> Tile:
    """Repeats the named axes of a parameter; `source` is its old name, where that differs. Raises
    KeyError for a parameter that AXES does not know."""
    outputs, summed = axes(name)
    dims = (*outputs, summed) if summed else outputs
    copies = tuple(times.get(axis, 1) for axis in dims)
    units = dims.index("ffn") if redrawn else 0
    return Tile(source or name, copies, summed is not None, noise, forked, redrawn, units)


def seeded(device: torch.device, *what: object) -> torch.Generator:
    """A generator of its own for each thing that is drawn: it depends on no other draw."""
    return torch.Generator(device).manual_seed(crc32(" ".join(map(str, what)).encode()))


@cache
def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of a model of this configuration, by name and in its order."""
    return {name: weight.shape for name, weight in outline(config).named_parameters()}


@torch.no_grad()
def carry_out(
    config: ModelConfig,
    plan: Plan,
    old: State,
    seed: int = 0,
    consume: bool = False,
    inspect: Inspect | None = None,
) -> State:
    """The State of the bigger model `config`. `old` is left as it was, or with `consume` emptied
    parameter by parameter, so that both models never lie in memory whole; what stays as it is then
    is handed on, not copied.

    Raises KeyError for a parameter without a row and ValueError for one that comes out misshapen.
    """
    new, like = State(config, {}), next(iter(old.weights.values()))
    uses = Counter(row.source for row in plan.values() if isinstance(row, Tile))
    for name, shape in shapes(config).items():
        row, before = plan[name], None
        generator = seeded(like.device, seed, name)
        if isinstance(row, Fresh):
            weight = row.weight(name, like.new_empty(shape), config.n_layers, generator)
        else:
            before, moments = old.weights[row.source], old.adam.get(row.source)
            uses[row.source] -= 1
            last = consume and not uses[row.source]
            handed_on = last and row.same and before.shape == shape
            weight = before if handed_on else row.weight(before, generator)
            if row.redrawn:
                row.redraw(weight, generator, seeded(like.device, seed, name.rpartition(".")[0]))
            if moments is not None and not row.forked:
                if not last:
                    moments = {**moments, "step": moments["step"].clone()}
                new.adam[name] = moments if handed_on else row.moments(moments)
            if last:
                del old.weights[row.source]
                old.adam.pop(row.source, None)
        if weight.shape != shape:
            raise ValueError(f"{name} came out as {tuple(weight.shape)}, not {tuple(shape)}")
        if inspect is not None:
            inspect(name, row, before, weight)
        new.weights[name] = weight
    return new

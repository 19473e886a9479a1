"""What a growth plan is, and how it is applied: the only tensor surgery in the project.

A plan has a row for every parameter of the bigger model: a `Tile` of an old parameter, or a
`NewParam`. The same rows grow the weights and Adam's moments. Widening `q_proj: heads < embed` by 2
repeats both axes, and the products that are summed over `embed` double, so the weight is halved:

    row = make_tile("blocks.0.attn.q_proj.weight", heads=2, embed=2)
    row.repeats, row.scale         # (2, 2), 1/2
    row.grow_weight(old, generator)  # [[old, old], [old, old]] / 2
    row.grad_share                 # 1/2: four copies of the gradient, times 1/2, add up to the old

So `exp_avg` is tiled times 1/2 and `exp_avg_sq` times 1/4. Experts share the tokens out, so that
the squares of their gradients shrink less:

    row = make_tile("blocks.0.moe.up_proj", "blocks.0.mlp.up_proj.weight", sparsity=4, expert=8)
    row.grad_share, row.grad_sq_share  # 1/8, and 1/16 for two chosen experts of eight
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
from models import SLM, axes, initialize, meta_model

AdamState = dict[str, dict[str, Tensor]]
"""Adam's `step`, `exp_avg` and `exp_avg_sq` of each parameter, by name."""
Shape = tuple[int, ...]


@dataclass
class TrainState:
    """A model between phases: its configuration, weights by name, and Adam's state by name."""

    config: ModelConfig
    weights: dict[str, Tensor]
    adam: AdamState = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: SLM) -> "TrainState":
        """Returns the model's own tensors, not copies of them, with an empty Adam state."""
        return cls(model.config, {name: p.detach() for name, p in model.named_parameters()})

    def to(self, device: torch.device, adam: torch.device | None = None) -> "TrainState":
        """Returns the state on `device`, Adam's part on `adam` where that is given."""

        def moved(tensors: dict[str, Tensor], target: torch.device) -> dict[str, Tensor]:
            return {name: tensor.to(target) for name, tensor in tensors.items()}

        moments = {name: moved(values, adam or device) for name, values in self.adam.items()}
        return TrainState(self.config, moved(self.weights, device), moments)

    def model(self) -> SLM:
        """Returns an SLM around these very tensors.

        Raises:
            RuntimeError: for a missing or misshapen tensor.
        """
        model = meta_model(self.config)
        model.load_state_dict(self.weights, assign=True)
        return model


class Tile(NamedTuple):
    """A parameter tiled from an old one: `old.tile(repeats)`, divided by the repeats of the input
    axis, because the products with its copies are summed.

    The loss is kept, so by the chain rule the gradients of the copies, times `scale`, add up to the
    old gradient: where the copies are alike, each gets `grad_share` of it.
    """

    source: str
    """Name of the old parameter."""
    repeats: Shape
    """How often each dimension of the new parameter repeats the old one."""
    has_input_axis: bool = False
    """Whether the last dimension is an input, over which products are summed."""
    noise: float = 0.0
    """Standard deviation of the noise, relative to the weight's; it cancels over copied inputs."""
    is_duplicate: bool = False
    """Whether the old parameter also goes on elsewhere. The function is then another, so that this
    copy's gradient is no share of the old one, and its Adam state starts empty."""
    reinit_fraction: float = 0.0
    """Fraction of each expert's units, along `unit_axis`, that are re-initialised."""
    unit_axis: int = 0
    sparsity: float = 1.0
    """Where the copies are experts, how many there are for each that a token visits."""

    @property
    def scale(self) -> float:
        """Factor on the old values."""
        return 1 / self.repeats[-1] if self.has_input_axis else 1.0

    @property
    def grad_share(self) -> float:
        """Each copy's gradient as a fraction of the old gradient."""
        return 1 / (math.prod(self.repeats) * self.scale)

    @property
    def grad_sq_share(self) -> float:
        """Each copy's squared gradient as a fraction of the old one: `grad_share` squared, unless
        experts share the tokens out.

        What tokens add to a gradient is mostly noise, whose squares add up rather than cancel. One
        of E experts sees k / E of the tokens, each with a weight near 1 / k, so that its squared
        gradient is expected to be (k / E) / k^2 = 1 / (E k) of the dense one, not 1 / E^2.
        """
        return self.grad_share**2 * self.sparsity

    @property
    def is_noisy(self) -> bool:
        """Whether noise sets the copies of its inputs apart."""
        return bool(self.noise) and self.has_input_axis and self.repeats[-1] > 1

    @property
    def is_rounded(self) -> bool:
        """Whether new values round: noise does, and a division by other than a power of two."""
        return self.is_noisy or math.frexp(self.scale)[0] != 0.5

    @property
    def is_unchanged(self) -> bool:
        """Whether the new parameter is the old one if it has its shape, and so its moments."""
        return math.prod(self.repeats) == 1 and not self.reinit_fraction and not self.is_duplicate

    def grow_weight(self, old: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the new parameter, with noise drawn from `generator`. `old` stays as it was."""
        if not self.is_noisy:
            return self.tile_scaled(old, self.scale)
        inputs = self.repeats[-1]
        old = old.contiguous()
        one_copy, all_copies, whole = tile_shapes(self.repeats, old.shape)
        start, std = old.view(one_copy).squeeze(-2) * self.scale, old.std()
        new = old.new_empty(all_copies)
        copies = new.unbind(-2)
        # The contrasts spread one draw less than there are copies, so that their sum is zero. This
        # factor makes up for the variance that is lost with it.
        relative = self.scale * self.noise * (inputs / (inputs - 1)) ** 0.5
        for coefficients in helmert_contrasts(inputs):
            noise = torch.empty_like(copies[0], memory_format=torch.contiguous_format)
            noise.normal_(generator=generator)
            for i, coefficient in enumerate(coefficients):
                is_first = len(coefficients) == 2 or i == len(coefficients) - 1
                so_far = start if is_first else copies[i]
                torch.addcmul(so_far, noise, std, value=coefficient * relative, out=copies[i])
        return new.view(whole)

    def tile_scaled(self, old: Tensor, factor: float) -> Tensor:
        """Returns `old.tile(repeats) * factor` in one pass over the memory."""
        one_copy, all_copies, whole = tile_shapes(self.repeats, old.shape)
        return (old.contiguous().view(one_copy).expand(all_copies) * factor).view(whole)

    def reinitialize(
        self, new: Tensor, generator: torch.Generator, choice: torch.Generator
    ) -> None:
        """Redraws `reinit_fraction` of each expert's units in place, normal with the mean and the
        standard deviation of the values they replace (Drop-Upcycling, arXiv:2502.19261).

        `choice` picks the units of each expert; generators seeded alike pick the same units in
        every projection. Moments stay, because they have the right size.
        """
        size = new.shape[self.unit_axis]
        for expert in new:
            units = torch.randperm(size, generator=choice, device=new.device)
            units = units[: round(self.reinit_fraction * size)]
            old = expert.index_select(self.unit_axis - 1, units)
            drawn = torch.empty_like(old).normal_(generator=generator)
            drawn.mul_(old.std()).add_(old.mean())
            expert.index_copy_(self.unit_axis - 1, units, drawn)

    def grow_moments(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the new parameter's Adam state from the old one's. `step` is the old tensor
        itself, not a copy."""
        return {
            "step": old["step"],
            "exp_avg": self.tile_scaled(old["exp_avg"], self.grad_share),
            "exp_avg_sq": self.tile_scaled(old["exp_avg_sq"], self.grad_sq_share),
        }

    def fold_copies(self, new: Tensor) -> Tensor:
        """Returns (output copies, *old shape): each copy of the outputs, its copied inputs summed.
        For a weight every one of them equals the old weight, whatever the noise."""
        sizes = [size // times for size, times in zip(new.shape, self.repeats, strict=True)]
        parts = new.reshape([n for pair in zip(self.repeats, sizes, strict=True) for n in pair])
        if self.has_input_axis:
            parts = parts.sum(-2)
        outputs = len(self.repeats) - self.has_input_axis
        copy_dims = list(range(0, 2 * outputs, 2))
        return parts.movedim(copy_dims, list(range(outputs))).flatten(0, outputs - 1)

    def output_copies(self, new: Tensor) -> Tensor:
        """Returns (output copies, ...): each copy of the outputs with all of its inputs."""
        outputs_only = (*self.repeats[:-1], 1) if self.has_input_axis else self.repeats
        return self._replace(repeats=outputs_only, has_input_axis=False).fold_copies(new)


@cache
def tile_shapes(repeats: Shape, old: Shape) -> tuple[Shape, Shape, Shape]:
    """Returns three shapes: the old one with two dimensions in place of each, its copies (1) and
    its size; the same with all copies; and the shape of the tiled tensor."""
    sizes = (*[1] * (len(repeats) - len(old)), *old)  # a dense weight lacks the axis of experts
    pairs = list(zip(repeats, sizes, strict=True))
    one_copy = tuple(n for size in sizes for n in (1, size))
    return one_copy, tuple(n for pair in pairs for n in pair), tuple(map(math.prod, pairs))


def helmert_contrasts(copies: int) -> list[list[float]]:
    """Returns Helmert's contrasts: for each number of terms from 2 to `copies`, coefficients that
    sum to zero, whose squares sum to one, and that are orthogonal to those of other numbers."""
    rows = []
    for terms in range(1, copies):
        length = (terms * (terms + 1)) ** 0.5
        rows.append([1 / length] * terms + [-terms / length])
    return rows


class NewParam(NamedTuple):
    """A parameter that comes from no old one. Its Adam state starts empty and warms up alone."""

    is_zero: bool = False
    """All zeros instead of the model's own initialisation."""
    init_scale: float = 1.0
    """Factor on that initialisation."""

    def create(self, name: str, like: Tensor, n_layers: int, generator: torch.Generator) -> Tensor:
        """Returns the parameter, with `like`'s shape, dtype and device, for a model of `n_layers`
        layers."""
        new = torch.zeros_like(like)
        if not self.is_zero:
            initialize(name, new, n_layers, generator)
        return new.mul_(self.init_scale)


PlanRow = Tile | NewParam
Plan = dict[str, PlanRow]
InspectParam = Callable[[str, PlanRow, Tensor | None, Tensor], None]
"""Sees each parameter as it is made: its name, row, old parameter (None if new), new parameter."""


def make_tile(
    name: str,
    source: str | None = None,
    noise: float = 0.0,
    is_duplicate: bool = False,
    reinit_fraction: float = 0.0,
    sparsity: float = 1.0,
    **repeats: int,
) -> Tile:
    """Returns the row that repeats the named axes of a parameter, `source` being its old name where
    that differs.

    Raises:
        KeyError: for a parameter that AXES does not know.
    """
    outputs, input_axis = axes(name)
    dims = (*outputs, input_axis) if input_axis else outputs
    times = tuple(repeats.get(axis, 1) for axis in dims)
    unit_axis = dims.index("ffn") if reinit_fraction else 0
    return Tile(
        source or name,
        times,
        has_input_axis=input_axis is not None,
        noise=noise,
        is_duplicate=is_duplicate,
        reinit_fraction=reinit_fraction,
        unit_axis=unit_axis,
        sparsity=sparsity,
    )


def make_generator(device: torch.device, *key: object) -> torch.Generator:
    """Returns a generator seeded by `key` alone, so that no draw depends on another."""
    return torch.Generator(device).manual_seed(crc32(" ".join(map(str, key)).encode()))


@cache
def param_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Returns the shape of every parameter of a model of `config`, by name and in its order."""
    return {name: weight.shape for name, weight in meta_model(config).named_parameters()}


def grown_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the weights that a plan makes of weights in `dtype`: at least float32
    where values round, because below it the noise would not cancel."""
    is_rounded = any(isinstance(row, Tile) and row.is_rounded for row in plan.values())
    return torch.promote_types(dtype, torch.float32) if is_rounded else dtype


@torch.no_grad()
def apply_plan(
    config: ModelConfig,
    plan: Plan,
    old: TrainState,
    seed: int = 0,
    consume: bool = False,
    inspect: InspectParam | None = None,
) -> TrainState:
    """Applies a plan to the weights and to Adam's state. The new weights are of `grown_dtype`.

    Args:
        config: The bigger model's configuration.
        plan: A row for each of its parameters.
        old: The smaller model, which stays as it was unless it is consumed.
        seed: Seed of noise, new parameters and re-initialised units.
        consume: Empty `old` parameter by parameter, so that both models never lie in memory whole.
            What does not change is then handed on, not copied.
        inspect: Called with each parameter as it is made.

    Returns:
        The bigger model's TrainState.

    Raises:
        KeyError: for a parameter without a row.
        ValueError: for a parameter that comes out misshapen.
    """
    new, like = TrainState(config, {}), next(iter(old.weights.values()))
    like = like.new_empty((), dtype=grown_dtype(plan, like.dtype))
    uses = Counter(row.source for row in plan.values() if isinstance(row, Tile))
    for name, shape in param_shapes(config).items():
        row, before = plan[name], None
        generator = make_generator(like.device, seed, name)
        if isinstance(row, NewParam):
            weight = row.create(name, like.new_empty(shape), config.n_layers, generator)
        else:
            before = old.weights[row.source]
            before = before.to(grown_dtype(plan, before.dtype))
            moments = old.adam.get(row.source)
            uses[row.source] -= 1
            is_last_use = consume and not uses[row.source]
            is_handed_on = is_last_use and row.is_unchanged and before.shape == shape
            weight = before if is_handed_on else row.grow_weight(before, generator)
            if row.reinit_fraction:
                choice = make_generator(like.device, seed, name.rpartition(".")[0])
                row.reinitialize(weight, generator, choice)
            if moments is not None and not row.is_duplicate:
                if not is_last_use:
                    moments = {**moments, "step": moments["step"].clone()}
                new.adam[name] = moments if is_handed_on else row.grow_moments(moments)
            if is_last_use:
                del old.weights[row.source]
                old.adam.pop(row.source, None)
        if weight.shape != shape:
            raise ValueError(f"{name} came out as {tuple(weight.shape)}, not {tuple(shape)}")
        if inspect is not None:
            inspect(name, row, before, weight)
        new.weights[name] = weight
    return new

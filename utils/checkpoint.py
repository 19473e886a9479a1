"""Checkpoints: weights and plain values in one `.pt` file that loads with `weights_only=True`."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from config import (
    Deepen,
    Growth,
    InputError,
    ModelConfig,
    TrainingConfig,
    Upcycle,
    Widen,
    require,
)
from transfer import State
from transfer.plan import shapes
from utils.device import on_cpu
from utils.files import load_tensors, save_tensors

SCHEMA = 1
OPERATORS = {how.__name__: how for how in (Upcycle, Widen, Deepen)}


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with all that is needed to use it, and how it came to be."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: str
    """The tokenizer.json of the `tokenizers` library."""
    eos: int
    """Id of the end-of-text token."""
    growth: tuple[Growth, ...] = ()
    """Every operator that the model has been through, in order."""
    probe: Tensor | None = None
    """The frozen windows (B, T + 1) that judge its growth."""
    phase_name: str = ""
    tokens: int = 0
    """Seen in training."""
    seed: int = 0
    balance_coef: float = TrainingConfig.balance_coef
    """Weight of the load-balancing loss that it was trained with."""
    init_from: str = ""
    """The pretrained model that it was before all else; empty: random weights."""

    @property
    def state(self) -> State:
        return State(self.config, self.weights)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Raises OSError where it cannot be written; the file that was there is then still there."""
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content |= {
        "schema": SCHEMA,
        "config": asdict(checkpoint.config),
        "weights": on_cpu(checkpoint.weights),
        "growth": [{"how": type(how).__name__, **asdict(how)} for how in checkpoint.growth],
        "probe": None if checkpoint.probe is None else checkpoint.probe.cpu(),
    }
    save_tensors(path, content)


def load(path: Path) -> Checkpoint:
    """On the CPU. Raises InputError for a file that is missing, damaged or no checkpoint, and for
    weights that are not all there, of another shape or not finite."""
    content = load_tensors(path)
    schema = content.pop("schema", None)
    require(schema == SCHEMA, f"{path} is no checkpoint of schema {SCHEMA} (schema = {schema})")
    try:
        content["config"] = ModelConfig.of(content["config"])
        content["growth"] = tuple(OPERATORS[how.pop("how")](**how) for how in content["growth"])
        checkpoint = Checkpoint(**content)
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path} is no checkpoint of this program ({error})") from error
    check_weights(path, checkpoint.config, checkpoint.weights)
    return checkpoint


def check_weights(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raises InputError, naming the parameter, unless `weights` are those of such a model."""
    require(isinstance(weights, dict), f"{path} is no checkpoint: its weights have no names")
    wanted = shapes(config)
    for name in wanted.keys() | weights.keys():
        require(name in weights, f"{path}: {name} is missing")
        require(name in wanted, f"{path}: {name} is no parameter of this model")
        require(isinstance(weights[name], Tensor), f"{path}: {name} is no tensor")
        shape, want = tuple(weights[name].shape), tuple(wanted[name])
        require(shape == want, f"{path}: {name} is {shape}, not {want}")
        require(bool(torch.isfinite(weights[name]).all()), f"{path}: {name} is not finite")

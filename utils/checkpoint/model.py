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
    Tolerance,
    TrainingConfig,
    Upcycle,
    Widen,
    require,
)
from transfer import TrainState
from transfer.plan import param_shapes
from utils.runtime.atomic_io import ADD_CHECKSUM, load_tensors, save_tensors
from utils.runtime.device import on_cpu
from utils.text.special_tokens import SpecialTokens

CHECKPOINT_SCHEMA = 3
OPERATORS = {operator.__name__: operator for operator in (Upcycle, Widen, Deepen)}


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that is needed to use it, and how it came to be."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: str
    """The tokenizer.json of the `tokenizers` library."""
    special_tokens: SpecialTokens
    growth_history: tuple[Growth, ...] = ()
    """Every operator that the model has been through, in order."""
    probe: Tensor | None = None
    """The frozen windows (B, T + 1) that judge its growth."""
    phase_name: str = ""
    tokens: int = 0
    """Training tokens that the model has seen."""
    seed: int = 0
    load_balance_coef: float = TrainingConfig.load_balance_coef
    """Weight of the load-balancing loss that it was trained with."""
    init_from: str = ""
    """The pretrained model that it began as; empty for random weights."""
    max_seq_len: int = 0
    """Context of that model in tokens, where it is longer than the one that this was trained on;
    an export has it again."""

    @property
    def state(self) -> TrainState:
        """The model as a TrainState with an empty Adam state."""
        return TrainState(self.config, self.weights)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> int:
    """Writes a checkpoint whole or not at all. Returns the checksum of its file.

    Raises:
        OSError: if it cannot be written; the file that was there is then still there.
    """
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content |= {
        "schema": CHECKPOINT_SCHEMA,
        "config": asdict(checkpoint.config),
        "weights": on_cpu(checkpoint.weights),
        "growth_history": [
            {"operator": type(growth).__name__, **asdict(growth)}
            for growth in checkpoint.growth_history
        ],
        "special_tokens": asdict(checkpoint.special_tokens),
        "probe": None if checkpoint.probe is None else checkpoint.probe.cpu(),
    }
    return save_tensors(path, content)


def load_checkpoint(path: Path, unchecked: bool | None = None) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Args:
        path: The file.
        unchecked: Read it also without its checksum. None is False where no `--unchecked` is
            offered, so that the error names none.

    Raises:
        InputError: for a file that is missing, damaged or no checkpoint, has no checksum unless
            `unchecked`, and for weights that are not all there, of another shape or not finite.
    """
    remedy = ADD_CHECKSUM if unchecked is None else "; --unchecked reads it all the same"
    content = load_tensors(path, bool(unchecked), remedy)
    schema = content.pop("schema", None)
    require(
        schema == CHECKPOINT_SCHEMA,
        f"{path} is no checkpoint of schema {CHECKPOINT_SCHEMA} (schema = {schema})",
    )
    try:
        content["config"] = ModelConfig.from_dict(content["config"])
        content["special_tokens"] = SpecialTokens(**content["special_tokens"])
        content["growth_history"] = tuple(map(growth_from_dict, content["growth_history"]))
        checkpoint = Checkpoint(**content)
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path} is no checkpoint of this program ({error})") from error
    check_weights(path, checkpoint.config, checkpoint.weights)
    return checkpoint


def growth_from_dict(values: dict) -> Growth:
    """Returns an operator from its name and fields. Raises KeyError or TypeError where there is no
    such operator."""
    operator = OPERATORS[values.pop("operator")]
    values["tolerance"] = Tolerance(**values["tolerance"])
    return operator(**values)


def check_weights(path: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raises InputError, naming the parameter, unless `weights` are those of a model of
    `config`."""
    require(isinstance(weights, dict), f"{path} is no checkpoint: its weights have no names")
    expected = param_shapes(config)
    for name in expected.keys() | weights.keys():
        require(name in weights, f"{path}: {name} is missing")
        require(name in expected, f"{path}: {name} is no parameter of this model")
        require(isinstance(weights[name], Tensor), f"{path}: {name} is no tensor")
        shape, wanted = tuple(weights[name].shape), tuple(expected[name])
        require(shape == wanted, f"{path}: {name} is {shape}, not {wanted}")
        require(bool(torch.isfinite(weights[name]).all()), f"{path}: {name} is not finite")

"""Checkpoints: weights and plain values in one `.pt` file that loads with `weights_only=True`."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from config import Deepen, Growth, InputError, ModelConfig, Upcycle, Widen, require
from transfer import State

FORMAT = 1
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

    @property
    def state(self) -> State:
        return State(self.config, self.weights)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Whole or not at all: written beside its place, flushed to the disk, then moved there."""
    content = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    content |= {
        "format": FORMAT,
        "config": asdict(checkpoint.config),
        "weights": {name: weight.cpu() for name, weight in checkpoint.weights.items()},
        "growth": [{"how": type(how).__name__, **asdict(how)} for how in checkpoint.growth],
        "probe": None if checkpoint.probe is None else checkpoint.probe.cpu(),
    }
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """On the CPU. Raises InputError for a file that is missing, damaged or no checkpoint."""
    require(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return unpack(content)
    except Exception as error:  # what is wrong with a file shows in any place, as any error
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path} is damaged or no checkpoint ({what})") from error


def unpack(content: dict) -> Checkpoint:
    found = content.pop("format")
    require(found == FORMAT, f"its format is {found}, not {FORMAT}")
    content["config"] = ModelConfig(**content["config"])
    content["growth"] = tuple(OPERATORS[how.pop("how")](**how) for how in content["growth"])
    return Checkpoint(**content)

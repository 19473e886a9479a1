"""A model before it has weights."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig
from models.model import SLM


class Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where they were to be drawn at random: to draw on the meta device
    loads torch's compiler, which takes seconds."""

    DRAWS = ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_")

    def __torch_function__(
        self,
        func: Callable,
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def outline(config: ModelConfig) -> SLM:
    """An SLM without weights, on the meta device: shapes and names, to be given weights later."""
    with torch.device("meta"), Undrawn():
        return SLM(config)

"""A model without weights, on torch's meta device: names and shapes, to be given weights later."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from config import ModelConfig
from models.model import SLM


class SkipInit(TorchFunctionMode):
    """Skips random initialisation: to draw on the meta device loads torch's compiler, which takes
    seconds."""

    INITIALIZERS = ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_")

    def __torch_function__(
        self,
        func: Callable,
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.INITIALIZERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def meta_model(config: ModelConfig) -> SLM:
    """Returns an SLM of `config` on the meta device."""
    with torch.device("meta"), SkipInit():
        return SLM(config)

"""Weights that are put together when they are needed, and a model that never has all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from config import ModelConfig
from models import SLM, outline


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made anew whenever it is asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]):
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def streamed(config: ModelConfig, weights: Mapping[str, Tensor]) -> SLM:
    """An SLM that takes the weights of each block from `weights` when it comes to compute with
    them, and lets go of them then; the others are there all the time."""
    model = outline(config)
    for path, module in model.named_children():
        if path == "blocks":
            for name, block in module.named_children():
                names = [f"{path}.{name}.{last}" for last in block.state_dict()]
                block.register_forward_pre_hook(Fill(weights, names))
                block.register_forward_hook(empty)
        else:
            Fill(weights, [f"{path}.{last}" for last in module.state_dict()])(module)
    return model


class Fill:
    """Gives a module its weights, by their names in the whole model."""

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str]):
        self.weights, self.names = weights, list(names)

    def __call__(self, module: nn.Module, *_: object) -> None:
        own = zip(module.state_dict(), self.names, strict=True)
        module.load_state_dict({last: self.weights[name] for last, name in own}, assign=True)


def empty(module: nn.Module, *_: object) -> None:
    module.to("meta")

"""A model whose blocks get their weights only while they compute, so that it never holds them
all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from config import ModelConfig
from models.meta import meta_model
from models.model import SLM


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made anew by `make(name)` whenever it is asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]):
        self.names, self.make = names, make

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def layerwise_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> SLM:
    """Returns an SLM that takes each block's weights from `weights` when the block computes, and
    drops them afterwards. Embedding, last norm and head stay loaded."""
    model = meta_model(config)
    for path, module in model.named_children():
        if path == "blocks":
            for name, block in module.named_children():
                names = [f"{path}.{name}.{last}" for last in block.state_dict()]
                block.register_forward_pre_hook(LoadWeights(weights, names))
                block.register_forward_hook(drop_weights)
        else:
            LoadWeights(weights, [f"{path}.{last}" for last in module.state_dict()])(module)
    return model


class LoadWeights:
    """A hook that gives a module its weights; `names` are theirs in the whole model."""

    def __init__(self, weights: Mapping[str, Tensor], names: Iterable[str]):
        self.weights, self.names = weights, list(names)

    def __call__(self, module: nn.Module, *_: object) -> None:
        pairs = zip(module.state_dict(), self.names, strict=True)
        module.load_state_dict({last: self.weights[name] for last, name in pairs}, assign=True)


def drop_weights(module: nn.Module, *_: object) -> None:
    """A hook that leaves a module without weights."""
    module.to("meta")

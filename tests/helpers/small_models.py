"""Models small enough to prove things with. No two axes that could be mistaken for each other are
equally long."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, RopeScaling
from models import SLM
from transfer import TrainState

DENSE = ModelConfig(
    vocab_size=29, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=10, seq_len=13
)
MOE = replace(DENSE, num_experts=5, top_k=2)
LEARNED = replace(DENSE, position_embedding="learned", tie_embeddings=False, n_kv_heads=None)
LEARNED_MOE = replace(MOE, position_embedding="learned", tie_embeddings=False)
LLAMA3_SCALING = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=20)
IMPORTED = replace(DENSE, head_dim=6, tie_embeddings=False, rope_scaling=LLAMA3_SCALING)
"""A model with what only models from elsewhere have."""
CONFIGS = {
    "dense": DENSE,
    "moe": MOE,
    "learned": LEARNED,
    "learned-moe": LEARNED_MOE,
    "imported": IMPORTED,
}
for_each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_model(config: ModelConfig) -> SLM:
    """Returns a model in float64 whose weights are random, gains included: a gain that is still 1
    would hide a wrong row of a plan."""
    torch.manual_seed(0)
    return perturbed(TrainState.from_model(SLM(config).double())).model()


def perturbed(state: TrainState) -> TrainState:
    """Returns the state with every weight moved, as training would move it, and without moments."""
    weights = {name: old + 0.2 * torch.randn_like(old) for name, old in state.weights.items()}
    return TrainState(state.config, weights)


def with_moments(state: TrainState) -> TrainState:
    """Returns the state with the moments of an Adam that has seen only the current gradient: the
    gradient and its square."""
    adam = {
        name: {"step": torch.tensor(7.0), "exp_avg": gradient, "exp_avg_sq": gradient.square()}
        for name, gradient in gradients(state).items()
    }
    return TrainState(state.config, state.weights, adam)


def random_train_state(config: ModelConfig) -> TrainState:
    """Returns the weights of `random_model` with moments."""
    return with_moments(TrainState.from_model(random_model(config)))


def state_tensors(state: TrainState) -> dict[tuple[str, str], Tensor]:
    """Returns weights and moments, by parameter and kind."""
    moments = {(name, kind): own[kind] for name, own in state.adam.items() for kind in own}
    return {(name, "weight"): weight for name, weight in state.weights.items()} | moments


def is_identical(one: TrainState, other: TrainState) -> bool:
    """Whether two states have the same tensors, bit for bit."""
    mine, theirs = state_tensors(one), state_tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def windows(
    config: ModelConfig, batch: int = 3, length: int | None = None, seed: int = 1
) -> Tensor:
    """Returns random tokens (B, T + 1); T is the model's whole context unless `length` is given."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, (length or config.seq_len) + 1
    return torch.randint(config.vocab_size, shape, generator=generator)


def logits(state: TrainState) -> Tensor:
    """Returns the model's logits on `windows`."""
    with torch.no_grad():
        return state.model()(windows(state.config)[:, :-1]).logits


def reference_loss(model: SLM, tokens_BS: Tensor) -> Tensor:
    """Returns the next-token loss as torch's own cross-entropy of all logits."""
    logits_BTV = model(tokens_BS[:, :-1]).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())


def gradients(state: TrainState, tokens_BS: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the gradient of the next-token loss on `windows`, or on other tokens (B, T + 1), by
    parameter."""
    tokens_BS = windows(state.config) if tokens_BS is None else tokens_BS
    model = state.model().requires_grad_()
    names, weights = zip(*model.named_parameters(), strict=True)
    loss = reference_loss(model, tokens_BS)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


def relative_error(value: Tensor, target: Tensor, min_norm: float | Tensor = 1e-12) -> float:
    """Returns the distance of `value` from `target`, relative to the target's norm or to `min_norm`
    where that is larger."""
    return ((value - target).norm() / target.norm().clamp_min(min_norm)).item()

"""Models of a size to prove things with. No two axes that could be mistaken are equally long."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, RopeScaling
from models import SLM
from transfer import State

DENSE = ModelConfig(
    vocab_size=29, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=10, seq_len=13
)
MOE = replace(DENSE, num_experts=5, top_k=2)
LEARNED = replace(DENSE, position="learned", tied=False, n_kv_heads=None)
LEARNED_MOE = replace(MOE, position="learned", tied=False)
SCALING = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=20)
IMPORTED = replace(DENSE, head_dim=6, tied=False, rope_scaling=SCALING)
"""With what only models from elsewhere have."""
CONFIGS = {"dense": DENSE, "moe": MOE, "learned": LEARNED, "learned-moe": LEARNED_MOE}
CONFIGS |= {"imported": IMPORTED}


def trained_like(config: ModelConfig) -> SLM:
    """Float64, and no zeros or ones: a gain still at 1 would hide a wrong row."""
    torch.manual_seed(0)
    return retrained(State.of(SLM(config).double())).model()


def retrained(state: State) -> State:
    """Every weight somewhere else, as training would leave it."""
    weights = {name: old + 0.2 * torch.randn_like(old) for name, old in state.weights.items()}
    return State(state.config, weights)


def with_moments(state: State) -> State:
    """Moments as if Adam had seen only the gradient of now: itself and its square."""
    adam = {
        name: {"step": torch.tensor(7.0), "exp_avg": slope, "exp_avg_sq": slope.square()}
        for name, slope in gradients(state).items()
    }
    return State(state.config, state.weights, adam)


def at_rest(config: ModelConfig) -> State:
    return with_moments(State.of(trained_like(config)))


def tensors(state: State) -> dict[tuple[str, str], Tensor]:
    """Weights and moments, by parameter and what it is."""
    moments = {(name, what): kept[what] for name, kept in state.adam.items() for what in kept}
    return {(name, "weight"): weight for name, weight in state.weights.items()} | moments


def identical(one: State, other: State) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def windows(config: ModelConfig, batch: int = 3, seed: int = 1) -> Tensor:
    """Tokens (B, T + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, config.seq_len + 1), generator=generator)


def logits(state: State) -> Tensor:
    with torch.no_grad():
        return state.model()(windows(state.config)[:, :-1]).logits


def next_token_loss(model: SLM, tokens_BS: Tensor) -> Tensor:
    logits_BTV = model(tokens_BS[:, :-1]).logits
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())


def gradients(state: State) -> dict[str, Tensor]:
    """Of the next-token loss on `windows`, by parameter."""
    model = state.model().requires_grad_()
    names, weights = zip(*model.named_parameters(), strict=True)
    loss = next_token_loss(model, windows(state.config))
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))
